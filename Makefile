# Every target makes its own virtual environment where there is none.
PYTHON ?= python3
VENV ?= .venv
# PyTorch's own CPU index keeps gigabytes of CUDA packages away; empty where it cannot be reached.
TORCH_INDEX ?= $(shell $(PYTHON) -c "import urllib.request as u; u.urlopen('https://download.pytorch.org/whl/cpu/torch/', timeout=5); print('https://download.pytorch.org/whl/cpu')" 2>/dev/null)

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
      $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES := export.py run_mic.py export runtime training benchmarks examples tests

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo ## export the bundled model, stream a clip in real time, leave demo.mp4 and demo.png
	$(BIN)/python export.py
	$(BIN)/python run_mic.py --wav models/bundled/demo.wav --out demo.mp4 --contact-sheet demo.png
	@echo "The film is demo.mp4, a contact sheet of it demo.png."

test: lint ## lint, types and all tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.demo engines/bundled/manifest.json ## per-frame latency of the bundled model on this machine
	$(BIN)/python -m benchmarks.latency --presets bundled --no-ablations

engines/bundled/manifest.json: $(VENV)/.demo
	$(BIN)/python export.py

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,viewer,export]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,viewer,export,train,dev]'
	touch $@

clean:
	rm -rf $(VENV) engines/bundled demo.mp4 demo.png
