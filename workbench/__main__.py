from workbench.apps.cli import main

main()
