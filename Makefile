# `make demo` and `make test` need Python 3.10 or newer and nothing else; both work in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(RUN) -m vispec.demo --out out/demo

test: $(VENV)/.installed lint
	$(RUN) -m pytest tests

lint: $(VENV)/.installed
	$(RUN) -m ruff check .

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) out
