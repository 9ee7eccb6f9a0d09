# The two commands of a newcomer are `make demo` and `make test`; everything happens in .venv and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# A content of the test split; the generated catalogue is the same everywhere.
UNSEEN := $(DEMO)/tables/media/contents/c00332.mp4
LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml

.PHONY: demo test check format install clean

demo: $(INSTALLED)
	@$(BIN)/python data_prep/synthetic.py --out $(DEMO)/tables --overwrite
	@$(BIN)/python data_prep/make_shards.py --tables $(DEMO)/tables --out $(DEMO)/shards --overwrite
	@rm -rf $(DEMO)/train
	@$(LAUNCH) train/contrastive.py demo --shards $(DEMO)/shards --out $(DEMO)/train
	@$(BIN)/mmrec embed --encoder $(DEMO)/train/encoder --shards $(DEMO)/shards --out $(DEMO)/embeddings --overwrite
	@$(BIN)/mmrec index build --embeddings $(DEMO)/embeddings --out $(DEMO)/index --overwrite
	@echo "a video that training never saw, and what it matches:"
	@$(BIN)/mmrec search --index $(DEMO)/index --video $(UNSEEN) --k 5
	@$(BIN)/mmrec evaluate --encoder $(DEMO)/train/encoder --shards $(DEMO)/shards --out $(DEMO) --picture $(DEMO)/matches.png

test: $(INSTALLED)
	@$(BIN)/pytest -n 2

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify index/*.ipynb
	@$(BIN)/pyright

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: $(INSTALLED)

# An old pip misreads the versions that faiss-gpu-cuvs asks for, so pip itself comes first.
# milvus-lite asks for faiss-cpu, which would be written over the files of faiss-gpu-cuvs; it takes either.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmrec needs Python 3.11 or later")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV) (about 6 GB, some minutes)"
	@$(BIN)/pip install --quiet --upgrade pip
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/pip install --quiet --constraint constraints.txt --no-deps milvus-lite
	@touch $@

clean:
	rm -rf $(VENV) runs
