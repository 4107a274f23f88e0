"""``workbench heads`` tells the roles of the heads."""

import json

from typer.testing import CliRunner

from workbench.apps.cli import app
from workbench.apps.sentences import role_lines
from workbench.probes.examples import bundled
from workbench.probes.heads.roles import head_roles


def call(*words):
    done = CliRunner().invoke(app, ["heads", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_roles_are_shown_and_written():
    shown = call("compiled-induction")
    assert "what each head does" in shown
    assert "copying: 1 head raises the logit of what it looks at, by its weights: 1.2" in " ".join(shown.split())
    found = json.loads(call("compiled-induction", "--head", "2", "--json"))
    assert [row["roles"] for row in found["roles"]] == ["current, positional", "induction, content, copying"]
    assert found["roles"][0]["copying"] is None
    assert "write to no logit" in found["roles_undefined"]["copying"]


def test_a_text_or_a_layer_alone_has_no_roles():
    assert json.loads(call("compiled-induction", "--layer", "1", "--json"))["roles"] is None
    assert json.loads(call("compiled-induction", "--text", "Mary and Mary went", "--json"))["roles"] is None


def test_roles_in_words():
    roles = head_roles(bundled("compiled-induction"), batches=1, sequences=2, length=24)
    assert "content: 1 head goes by content: 1.2" in role_lines(roles)
    assert any(
        line.startswith("positional: 7 heads go by position: ") and line.endswith("and 3 more")
        for line in role_lines(roles)
    )
