# `make` lists the targets. Two commands on a fresh machine: `make demo`, `make test`.
PYTHON ?= python3
# The build of torch to test with; another one serves as well (2.6 or newer).
TORCH ?= torch==2.13.0
BIN := .venv/bin
REASONER := kvbudget-reasoner-v2
CARD := validate/reasoner/weights
POLICIES := streamingllm,snapkv,rkv,pyramid-rkv,rkv+wave,rkv+utility,reasonalloc,random,random-prompt
# A grid of R-KV: alpha, layers and heads, for a notebook that chooses on one trace and judges on others.
GRID := $(foreach division,rkv rkv+utility rkv+wave rkv+wave+utility rkv+pyramid rkv+pyramid+utility rkv+cake rkv+cake+utility,$(foreach alpha,0.02 0.1 0.3,$(division):alpha=$(alpha)))
# Every named policy; the windows and lags that suit traces of some 700 tokens.
EVERY := streamingllm,recency,h2o,tova,snapkv,snapkv-paper:window=8,keydiff,knorm,lagkv:lag=16,expected-attention,vatp:sinks=4,criticalkv:window=8,append-only,rkv,rkv-code,pyramid-rkv,rkv+pyramid-code,rkv+wave,rkv+wave-dynamic,rkv+cake:cake_window=8,rkv+squeeze,rkv+table,rkv+adakv,rkv+utility,rkv+headkv,rkv+duo,reasonalloc,pyramidkv:window=8,ada-snapkv:window=8,headkv-snapkv:window=8,cakekv:window=8,cake_window=8,h2o+adakv,random,random-prompt
OTHERS := rkv+adakv,rkv+cake,rkv:alpha=0.5,expected-attention,h2o,tova,snapkv-paper:window=8,keydiff
# The paper's policies, the controls and what others published, and what the search on the reasoner found.
FOUND := rkv+cake:window=30,kernel_size=1,group_reduce=max_weights,alpha=0.1265,similarity_threshold=0.3718,cake_window=31,tau1=1.283,tau2=1.007
STUDY := snapkv,rkv,pyramid-rkv,rkv+wave,rkv+utility,reasonalloc,random,random-prompt,recency,h2o,tova,keydiff,rkv+cake,$(FOUND)
STUDIED := 5%,10%,20%,30%,50%,64,128,256
STORED := validate/pretrained/results
PRETRAINED := smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b
# Texts whose sensitivities are recorded.
SHIFTED_smollm2-135m := code-08-2|code-09-2|code-10-1|code-11-2|code-12-4|prose-08-0|prose-17-0|math-geometry-172|aime-2024-65|math-intermediate_algebra-964
SHIFTED_qwen2.5-coder-0.5b := aime-2024-60|aime-2024-69|aime-2024-83|aime-2024-89|math-algebra-2626|math-algebra-297|math-intermediate_algebra-1197|math-intermediate_algebra-956|math-prealgebra-1655|math-precalculus-675
SHIFTED_qwen2.5-coder-1.5b := aime-2024-61|aime-2024-63|math-algebra-1837|math-algebra-2427|math-intermediate_algebra-1197|math-intermediate_algebra-1994
# What a search chooses on, and judges by; what it finds is measured on all texts that it did not choose on.
SEARCHED := aime-2024-60 aime-2024-69 math-algebra-2626 math-intermediate_algebra-1197 math-precalculus-675
FORCED_SEARCHED := aime-2024-77 aime-2024-87 aime-2024-89 math-algebra-1143 math-algebra-2193 math-counting_and_probability-525 math-intermediate_algebra-956 math-intermediate_algebra-966
WINNERS := snapkv-paper:window=29,kernel_size=1,pool=avg,snapkv:window=22,kernel_size=1,group_reduce=max_weights
HELD_OUT := aime-2024-83 aime-2024-89 math-algebra-297 math-intermediate_algebra-956 math-prealgebra-1655
FITTED := rkv,rkv+wave,rkv+utility,reasonalloc,pyramid-rkv,snapkv,random
# Texts that are decoded with entries really evicted.
FORCED_smollm2-135m := aime-2024-70 code-19-0 prose-08-0
FORCED_qwen2.5-coder-0.5b := aime-2024-60 math-algebra-2626 math-intermediate_algebra-1197 math-precalculus-675
FORCED_qwen2.5-coder-1.5b := math-algebra-1837 math-number_theory-1055
BUDGETS := 20%,30%,15%,40%,10%,50%
PROBLEMS ?= 768
comma := ,
empty :=
space := $(empty) $(empty)
PROTECTIONS := none sinks:4+recent:8 prompt+recent:64 boundary:10%
PROTECTING := random,rkv,snapkv,h2o$(subst $(space),,$(foreach scorer,random rkv snapkv h2o,$(foreach own,$(PROTECTIONS),$(comma)$(scorer):protect=$(own))))
# Processes that run tests.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-real nightly traces results policies validate others shifts grid search pretrained wave card notebooks gpu lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

demo: .venv/.base ## replay 8 policies x 4 budgets on the bundled trace (no torch, no network after the install)
	$(BIN)/sim replay --trace sample --buffer 32
	@echo "sim is in $(BIN): . $(BIN)/activate puts it on the path"

quick: .venv/.full ## the tests to run at every change (1 minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not cluster and not nightly and not real"

test: .venv/.full lint ## install everything, check the code, run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

nightly: .venv/.full lint ## the same, with every case of the products that `make test` draws samples of
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not real"

test-real: .venv/.full ## bring a pretrained model of 98 MB and run everything on it (5 minutes)
	$(BIN)/python -m pytest -m real

traces: .venv/.full ## record 72 held-out problems of the reference model, 24 of each family (490 MB in runs/)
	mkdir -p runs
	$(BIN)/sim reasoner problems --count 72 --seed 2 > runs/heldout.jsonl
	$(BIN)/sim record --model reference --prompts runs/heldout.jsonl --out runs/heldout --values

results: traces ## replay all policies on those traces: the table of the results page
	$(BIN)/sim replay --trace runs/heldout --buffer 32

policies: traces ## replay every named policy on 30 of those traces: the standings of the results page (6 minutes)
	$(BIN)/sim replay --trace 'runs/heldout/*-s2-00[0-2]?.kvtrace' --policy $(EVERY) --buffer 32 -o runs/policies.parquet
	for metric in lost_lookup_peak lost_lookup_rate mass_mean; do \
	  $(BIN)/sim results runs/policies.parquet --metric $$metric -o validate/reasoner/results/standings-$$metric.csv; done

validate: traces ## decode problems with eviction, 9 policies x 6 budgets; judge the simulator by it (3 hours, resumes)
	$(BIN)/sim reasoner problems --count 768 --seed 1 > runs/judged.jsonl
	$(BIN)/sim replay --trace 'runs/heldout/*-s2-00[0-2]?.kvtrace' --policy $(POLICIES) --budget $(BUDGETS) --buffer 32 -o runs/simulated.parquet
	$(BIN)/sim validate live --prompts runs/judged.jsonl --limit $(PROBLEMS) --policy $(POLICIES) --budget $(BUDGETS) --buffer 32 \
	  --out runs/live --simulated runs/simulated.parquet --report runs/report.html
	cp runs/live/accuracy.csv runs/live/fidelity.csv runs/live/*.svg validate/reasoner/results/
	$(BIN)/sim results runs/simulated.parquet --means -o validate/reasoner/results/simulated.csv

others: traces ## the same for 8 policies and 256 problems that no number was chosen on (1 hour, resumes)
	$(BIN)/sim reasoner problems --count 768 --seed 1 > runs/judged.jsonl
	$(BIN)/sim replay --trace 'runs/heldout/*-s2-00[0-2]?.kvtrace' --policy $(OTHERS) --budget 15%,20%,30%,50% --buffer 32 -o runs/simulated-others.parquet
	$(BIN)/sim validate live --prompts runs/judged.jsonl --limit 256 --policy $(OTHERS) --budget 20%,30%,15%,50% --buffer 32 \
	  --out runs/live-others --simulated runs/simulated-others.parquet
	for name in accuracy fidelity; do cp runs/live-others/$$name.csv validate/reasoner/results/$$name-others.csv; done
	$(BIN)/sim results runs/simulated-others.parquet --means -o validate/reasoner/results/simulated-others.csv

shifts: .venv/.full ## record sensitivities of 30 of those problems, replay all 17 policies on them (15 minutes)
	mkdir -p runs
	$(BIN)/sim reasoner problems --count 72 --seed 2 | grep -E '"id": "[^"]*-s2-00[0-2]."' > runs/shifted.jsonl
	$(BIN)/sim record --model reference --prompts runs/shifted.jsonl --sensitivity 8 --out runs/shifted
	$(BIN)/sim replay --trace runs/shifted --policy $(POLICIES) --budget $(BUDGETS) --buffer 32 -o runs/shifts.parquet
	$(BIN)/sim replay --trace runs/shifted --policy $(OTHERS) --budget 15%,20%,30%,50% --buffer 32 -o runs/shifts-others.parquet
	for name in shifts shifts-others; do $(BIN)/sim results runs/$$name.parquet --means -o validate/reasoner/results/$$name.csv; done

grid: traces ## replay 24 variants of R-KV on ten held-out walks, for a notebook (1 minute)
	$(BIN)/sim replay --trace 'runs/heldout/walk-*-s2-00[0-2]?.kvtrace' --policy $(subst $(space),$(comma),$(GRID)) --budget 10%,20%,40% --buffer 32 -o runs/grid.parquet
	$(BIN)/sim results runs/grid.parquet --means -o validate/reasoner/results/simulated-grid.csv

search: traces ## search policies for 15 minutes on 30 traces, judge them on 42 others, decode the winners (1 hour, resumes)
	$(BIN)/sim reasoner problems --count 768 --seed 1 > runs/judged.jsonl
	$(BIN)/sim search --trace 'runs/heldout/*-s2-00[0-2]?.kvtrace' --held-out 'runs/heldout/*-s2-00[3-7]?.kvtrace' \
	  --budget 20%,30% --buffer 32 --minutes 15 --metric lost_lookup_rms --out runs/search
	$(BIN)/sim validate live --prompts runs/judged.jsonl --limit 256 --configs runs/search/winners.json --out runs/live-winners
	cp runs/live-winners/accuracy.csv validate/reasoner/results/accuracy-winners.csv
	cp runs/search/winners.json validate/reasoner/results/winners.json

pretrained: .venv/.full ## waves of three pretrained models, and what eviction does to their predictions and answers (a day, resumes)
	mkdir -p runs/pretrained $(STORED)/waves
	$(BIN)/sim models fetch $(PRETRAINED)
	set -e; for model in $(PRETRAINED); do \
	  runs=runs/pretrained/$$model; texts=validate/pretrained/texts; \
	  $(BIN)/sim record --model $$model --dtype bfloat16 --prompts $$texts/calibration-$$model.jsonl --rescore --out $$runs/calibration; \
	  $(BIN)/sim record --model $$model --dtype bfloat16 --prompts $$texts/$$model.jsonl --rescore --out $$runs/traces; \
	  for kind in gsm8k math code prose; do \
	    $(BIN)/sim calibrate --trace "$$runs/calibration/$$kind-*" --out $(STORED)/waves/$$model-on-$$kind.json; done; \
	  $(BIN)/sim calibrate --trace "$$runs/calibration/gsm8k-*" --trace "$$runs/calibration/math-*" --out $$runs/wave.json; done
	set -e; for model in $(PRETRAINED); do \
	  runs=runs/pretrained/$$model; cp $$runs/wave.json simulator/waves/$$model.json; done
	set -e; for model in $(PRETRAINED); do \
	  runs=runs/pretrained/$$model; \
	  $(BIN)/sim validate masked --model $$model --trace $$runs/traces --policy $(STUDY) --budget $(STUDIED) --buffer 32 \
	    --out $$runs/masked -o $(STORED)/masked-$$model.parquet; done
	set -e; $(foreach model,$(PRETRAINED),$(BIN)/sim validate forced --model $(model) --dtype bfloat16 \
	  $(foreach text,$(FORCED_$(model)),--trace runs/pretrained/$(model)/traces/$(text).kvtrace) \
	  --policy $(STUDY) --budget 10%,20% --buffer 32 --out runs/pretrained/$(model)/forced -o $(STORED)/forced-$(model).parquet;)
	$(BIN)/sim validate live --model qwen2.5-coder-0.5b --dtype bfloat16 --prompts gsm8k-400 --limit 200 --max-new-tokens 400 \
	  --policy rkv,reasonalloc,h2o,snapkv,random --budget 128 --buffer 32 --batch 100 --out runs/pretrained/graded -o $(STORED)/graded-qwen2.5-coder-0.5b.parquet
	$(BIN)/python tests/tools/texts_to_rescore.py --model qwen2.5-coder-0.5b --prompts gsm8k-400 --from runs/pretrained/graded --most 24 --out runs/pretrained/graded.jsonl
	$(BIN)/sim record --model qwen2.5-coder-0.5b --dtype bfloat16 --prompts runs/pretrained/graded.jsonl --rescore --out runs/pretrained/graded-traces
	set -e; for level in masked forced; do \
	  $(BIN)/sim validate $$level --model qwen2.5-coder-0.5b --trace runs/pretrained/graded-traces --policy rkv,reasonalloc,h2o,snapkv,random \
	    --budget 128 --buffer 32 --out runs/pretrained/graded-$$level -o $(STORED)/graded-$$level-qwen2.5-coder-0.5b.parquet; done
	set -e; $(foreach model,$(PRETRAINED),\
	  grep -E '"id": "($(SHIFTED_$(model)))"' validate/pretrained/texts/$(model).jsonl > runs/pretrained/$(model)/shifted.jsonl; \
	  $(BIN)/sim record --model $(model) --dtype bfloat16 --prompts runs/pretrained/$(model)/shifted.jsonl --rescore --sensitivity 8 \
	    --out runs/pretrained/$(model)/shifted; \
	  $(BIN)/sim replay --trace runs/pretrained/$(model)/shifted --policy $(STUDY) --budget $(STUDIED) --buffer 32 -o $(STORED)/shift-$(model).parquet; \
	  $(BIN)/sim validate calibrate --trace runs/pretrained/$(model)/shifted --policy $(FITTED) --shifts $(STORED)/shift-$(model).parquet \
	    --measured $(STORED)/masked-$(model).parquet --out simulator/results/calibrations/$(model).json;)
	$(BIN)/sim search --metric shift_mean $(foreach text,$(SEARCHED),--trace runs/pretrained/qwen2.5-coder-0.5b/shifted/$(text).kvtrace) \
	  $(foreach text,$(HELD_OUT),--held-out runs/pretrained/qwen2.5-coder-0.5b/shifted/$(text).kvtrace) \
	  --budget 10%,20% --buffer 32 --minutes 15 --also reasonalloc,h2o --out runs/pretrained/search
	cp runs/pretrained/search/winners.json $(STORED)/winners-qwen2.5-coder-0.5b.json
	$(BIN)/sim validate masked --model qwen2.5-coder-0.5b --dtype bfloat16 --configs runs/pretrained/search/winners.json \
	  $$(ls -d runs/pretrained/qwen2.5-coder-0.5b/traces/* | grep -v -E '/($(subst $(space),|,$(SEARCHED)))\.' | sed 's/^/--trace /') \
	  --out runs/pretrained/searched -o $(STORED)/searched-qwen2.5-coder-0.5b.parquet
	set -e; texts="$(foreach text,$(FORCED_SEARCHED),--trace runs/pretrained/qwen2.5-coder-0.5b/traces/$(text).kvtrace)"; \
	  forced="$(BIN)/sim validate forced --model qwen2.5-coder-0.5b --dtype bfloat16 --out runs/pretrained/searched-forced"; \
	  $$forced $$texts --configs runs/pretrained/search/winners.json -o runs/pretrained/searched-forced.parquet; \
	  $$forced $$texts --policy rkv --budget 10%,20% --buffer 32 -o runs/pretrained/searched-forced-rkv.parquet
	$(BIN)/python -c "import polars as pl; pl.concat([pl.read_parquet(f'runs/pretrained/searched-forced{own}.parquet') for own in ('', '-rkv')], how='diagonal_relaxed').write_parquet('$(STORED)/searched-forced-qwen2.5-coder-0.5b.parquet')"
	$(BIN)/sim validate live --model qwen2.5-coder-0.5b --dtype bfloat16 --prompts gsm8k-400 --limit 200 --max-new-tokens 400 --policy "$(WINNERS)" \
	  --budget 128 --buffer 32 --batch 100 --out runs/pretrained/searched-graded -o $(STORED)/searched-graded-qwen2.5-coder-0.5b.parquet
	$(BIN)/sim validate masked --model qwen2.5-coder-0.5b --dtype bfloat16 \
	  $(foreach text,$(subst |, ,$(SHIFTED_qwen2.5-coder-0.5b)),--trace runs/pretrained/qwen2.5-coder-0.5b/shifted/$(text).kvtrace) \
	  --policy "$(PROTECTING),gkv,vase,random-unified" --budget 30% --buffer 32 \
	  --out runs/pretrained/protected -o $(STORED)/protected-qwen2.5-coder-0.5b.parquet
	$(BIN)/sim models charts --out $(STORED)
	$(BIN)/sim reasoner pages

wave: .venv/.full ## measure the reference model's wave again, on problems that nothing is judged on
	mkdir -p runs
	$(BIN)/sim reasoner problems --count 6 --seed 3 > runs/calibration.jsonl
	$(BIN)/sim record --model reference --prompts runs/calibration.jsonl --out runs/calibration
	$(BIN)/sim calibrate --trace runs/calibration --out simulator/waves/$(REASONER).json

card: traces ## measure everything on the reference model's card again: accuracy, demand, heads (10 minutes)
	$(BIN)/sim reasoner evaluate --json $(CARD)/accuracy-float32.json
	$(BIN)/sim reasoner evaluate --dtype bfloat16 --json $(CARD)/accuracy-bfloat16.json
	$(BIN)/sim reasoner profile --traces runs/heldout --out $(CARD)/profile.json
	$(BIN)/sim reasoner charts --profile $(CARD)/profile.json --out $(CARD)

notebooks: .venv/.full ## run all notebooks and save them with their outputs (1 minute)
	$(BIN)/python notebooks/execute.py

gpu: .venv/.full ## check and measure the kernels on a GPU, for validate/results (10 minutes)
	$(BIN)/python -m pytest tests/validate/eviction/kernels tests/validate/eviction/device
	mkdir -p validate/results
	$(BIN)/sim validate bench --gpu --out validate/results

lint: .venv/.full ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.full ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

# torch first and by exact version: asked for through the extra, pip may pick a build with gigabytes of CUDA.
.venv/.full: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[validate,plots,dev]"
	@touch $@ .venv/.base
