# Two commands matter: `make demo` and `make test`. Each target does its own set-up (see tools/with-env).
PROMPT ?= Write a Python function that checks whether a number is prime, and explain how it works.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help demo test test-full bench gpu-check
help:
	@echo 'make demo [PROMPT="..."]  stream an answer from the embedded model, then decode it again in ar mode'
	@echo 'make test                 every test tier that this machine can run (8 to 15 minutes at first)'
	@echo 'make test-full            the same with the whole grids'
	@echo 'make bench                every benchmark that this machine can run, into build/bench'
	@echo 'make gpu-check            build and run the GPU tier with the Python that is here; needs no network'

demo:
	@tools/with-env orthrus-rt generate --chat --mode two_pass --draft-len 5 --max-new-tokens 256 --compare-ar --stats -- "$$PROMPT"

test:
	@tools/with-env python3 tools/test.py

test-full:
	@tools/with-env python3 tools/test.py --full

bench:
	@tools/with-env python3 tools/bench.py

gpu-check:
	@tools/with-env --here python3 tools/test.py gpu
