# make run    sweep the sample catalogue and print the comparison
# make test   run the tests
# make up     start a local Prefect server with its dashboard, register the deployments and run a worker
# make screenshots   take the README's pictures of the dashboard (needs Chromium)
# make lock   write the images' lock files anew from pyproject.toml (UPGRADE=--upgrade for newer versions)
PYTHON ?= python3
BIN := .venv/bin
# A home of its own: the project's runs, results and database stay out of the user's own Prefect.
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PREFECT_LOGGING_EXTRA_LOGGERS ?= semids
export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW ?= ignore
export PREFECT_SERVER_API_HOST ?= 127.0.0.1
export PREFECT_SERVER_API_PORT ?= 4200

.PHONY: install run test check up screenshots lock clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cpu,minilm,ray,s3,dev]'
	touch $@

runs/sample.parquet: | install
	$(BIN)/semids sample $@

run: install runs/sample.parquet
	env -u PREFECT_API_URL $(BIN)/python -m flows.sweep deployments/configs/sample-sweep.yaml

test: install
	$(BIN)/python -m pytest -n 3 --dist loadgroup

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

up: install runs/sample.parquet
	$(BIN)/python -m deployments.up

screenshots: install runs/sample.parquet
	$(BIN)/python tests/screenshots.py

lock: install
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	UV=$(BIN)/uv UPGRADE=$(UPGRADE) docker/lock.sh

clean:
	rm -rf .venv runs .prefect
