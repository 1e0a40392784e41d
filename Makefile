# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/rdpo-target
CARGO ?= cargo

.PHONY: test check
test: check
	$(CARGO) test --release --all-targets

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --release --all-targets -- -D warnings
