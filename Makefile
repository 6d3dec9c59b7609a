# `make demo` and `make test` need Python 3.10 or newer and nothing else; both work in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The decoder's tests under transformers 5, which needs Python 3.11, in an environment beside it.
PYTHON5 ?= $(PYTHON)
VENV5 ?= .venv-transformers5
RUN5 = $(VENV5)/bin/python
# lmms-eval and what it imports, in an environment beside it.
VENV_LMMS ?= .venv-lmms
RUN_LMMS = $(VENV_LMMS)/bin/python
# A file's tests share what it has made, so they stay together; each process is one thread and about a gigabyte.
PYTEST = -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
DECODER_TESTS = rounds golden greedy text_decoder products joined_weights batches spec_model model_pairs inputs families pairs tree \
	checkpoints refused_targets tune sampling policies cache package train_config \
	decoder_kinds layouts video recurrent models_table generation generation_returns hub \
	eagle3 eagle3_files msd specvlm vlm nemo export adaptive gaze joining prefixes soak

.PHONY: demo test lint fuzz soak test-replicas test-transformers5 test-lmms clean

demo: $(VENV)/.installed
	$(RUN) -m vispec.demo --out out/demo

test: $(VENV)/.installed-test lint
	$(RUN) $(PYTEST) tests

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

# Broken input of all kinds; a failure is told with the number that repeats it.
fuzz: $(VENV)/.installed-test
	$(RUN) -m tests.fuzz.run --cases 5000

# Random decoding, and work that is killed: SOAK="--minutes 60 --seed 1000"
soak: $(VENV)/.installed-test
	$(RUN) -m tests.fuzz.soak $(SOAK)

# The server's replicas on a Ray cluster, one of which is killed.
test-replicas: $(VENV)/.installed-test
	VISPEC_TEST_REPLICAS=1 $(RUN) -m pytest tests/test_replicas.py

test-transformers5: $(VENV5)/.installed
	$(RUN5) $(PYTEST) $(DECODER_TESTS:%=tests/test_%.py)

test-lmms: $(VENV_LMMS)/.installed
	$(RUN_LMMS) -m pytest tests/test_lmms.py

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps -e .
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet -r requirements-test.txt
	touch $@

$(VENV5)/.installed: requirements-transformers5.txt
	$(PYTHON5) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "transformers 5 needs Python 3.11: PYTHON5=…")'
	$(PYTHON5) -m venv $(VENV5)
	$(RUN5) -m pip install --quiet -r requirements-transformers5.txt
	touch $@

$(VENV_LMMS)/.installed: requirements-lmms.txt setup.py
	$(PYTHON) -m venv $(VENV_LMMS)
	$(RUN_LMMS) -m pip install --quiet -r requirements-lmms.txt
	$(RUN_LMMS) -m pip install --quiet --no-deps lmms-eval==0.7.3 -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV5) $(VENV_LMMS) out
