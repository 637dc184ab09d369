# One command per task.  A fresh machine needs python3 (3.11 or newer, with venv), gcc and make.
# Tests on the second engine need a redis-server (Debian: apt install redis-server); without one they are left out.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := embedded,cli,test,lint
BUILT := $(VENV)/.built
WEB := build/web
WEB_BUILT := $(WEB)/.built
SITE := build/docs
WHEELS := build/wheels
PYTHONS := python3.11 python3.12 python3.13 python3.14
BENCH_BUILT := $(VENV)/.built-bench
SANITIZE := build/sanitize

# Python and Lua files are read where they are; only these need a build after a change.
COMPILED := $(shell find ff_fast -name '*.pyx' -o -name '*.pxd')
COPIED := setup.py pyproject.toml MANIFEST.in Makefile CHANGELOG.md CONTRIBUTING.md README.md LICENSE ff_fast lua tests bench \
	docs examples tools .ci .github .pre-commit-config.yaml SECURITY.md zensical.toml

# Workers that have nothing left take tests from the others.
PYTEST := $(BIN)/python -m pytest -p no:benchmark
PARALLEL := -n 4 --dist worksteal

# Compiled modules are kept whatever the environment says: to compile all tests takes each worker process 7 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: build demo demo-web test test-cluster test-web pictures docs unit check soak chaos coverage lint types sanitize wheel-test sdist wheels \
	test-pythons bench bench-quick clean help

help: ## List the tasks
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: $(BUILT) ## Create .venv and install this checkout in it, in editable mode
$(BUILT): setup.py pyproject.toml $(COMPILED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

demo: build ## Stream a text through an embedded server: make demo RATE=1000 ARGS=...
	$(BIN)/ff-fast demo $(if $(RATE),--rate $(RATE)) $(ARGS)

demo-web: build ## Serve a chat in a browser, with a worker to kill: make demo-web ARGS="--port 9000"
	$(BIN)/ff-fast demo --web $(ARGS)

# pytest-benchmark, when make bench has installed it, warns about worker processes.
QUICK := -m "not packaging and not long and not web"
test: build ## Run the whole suite but packaging and long tests: make test ARGS="tests/unit -k keys"
	$(PYTEST) $(PARALLEL) $(QUICK) $(ARGS)

test-cluster: build ## Run the tests that share a server against a cluster in its place, then every long test
	FF_FAST_TEST_CLUSTER=1 $(PYTEST) $(PARALLEL) $(QUICK) tests/server tests/faults $(ARGS)
	$(PYTEST) $(PARALLEL) -m "long and not web" $(ARGS)

# Its packages come before those of .venv, which it sees as well.
test-web: $(WEB_BUILT) ## Run the web tests with other people's packages, and Chromium: make test-web ARGS="-k a2a"
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ echo "Chromium and its driver are not installed (Debian: apt install chromium chromium-driver)." >&2; exit 1; }
	$(WEB)/venv/bin/python -m pytest -p no:benchmark -n 2 --dist worksteal tests/web $(ARGS)

pictures: $(WEB_BUILT) ## Take the pictures of the chat that are in docs/images
	mkdir -p docs/images
	FF_FAST_SCREENSHOTS=docs/images $(WEB)/venv/bin/python -m pytest -p no:benchmark tests/web/test_chat.py

$(WEB_BUILT): $(BUILT) tests/web/requirements.txt tests/web/package.json tests/web/package-lock.json
	test -x $(WEB)/venv/bin/python || $(BIN)/python -m venv $(WEB)/venv
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(WEB)/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ff_fast_venv.pth
	$(WEB)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r tests/web/requirements.txt
	mkdir -p $(WEB)/node
	cp tests/web/package.json tests/web/package-lock.json $(WEB)/node
	cd $(WEB)/node && npm ci --silent --no-audit --no-fund
	touch $@

docs: build docs/requirements.txt ## Build the site of the documentation, with warnings as errors, and check its links
	test -x $(SITE)/venv/bin/python || $(PYTHON) -m venv $(SITE)/venv
	$(SITE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/python -m tools.build_docs $(SITE)/venv/bin/zensical

unit: build ## Run the tests that need no server, in seconds
	$(PYTEST) $(PARALLEL) tests/unit $(ARGS)

check: lint types unit ## Everything that takes seconds, before a commit

soak: build ## Break everything for an hour, by a seed, and check what is left: make soak ARGS="--seconds 60 --seed 7"
	$(BIN)/python -m tests.soak $(ARGS)

chaos: build ## Move, kill and restart servers under hundreds of streams: make chaos ARGS="--only kill --shell sync --seconds 60 --seed 7"
	$(BIN)/python -m tests.cluster.chaos $(ARGS)

# What is compiled is not measured, and its oracles are slow under measurement: make unit runs these.
UNMEASURED := $(patsubst %,--ignore tests/unit/%,test_frames.py test_merge.py test_rate.py test_resp.py writer)
coverage: build ## Run the tests of Python code under branch coverage; its floor is in pyproject.toml
	$(PYTEST) $(PARALLEL) $(QUICK) --cov $(UNMEASURED) $(ARGS)

# cython-lint runs pycodestyle from PATH.
lint: build ## Check style: ruff, ruff format, cython-lint, luacheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint ff_fast
	@if command -v luacheck >/dev/null; then $(BIN)/python -m tools.assemble_lua --check; \
	else echo "lua/ is NOT checked: luacheck is not installed (Debian: apt install lua-check)"; fi

types: build ## Check types: mypy --strict, and the stubs against the compiled modules
	$(BIN)/mypy --strict
	$(BIN)/python -m mypy.stubtest --allowlist .ci/stubtest-allowlist --ignore-unused-allowlist ff_fast._hot

# A copy of the checkout, because an editable build puts its extensions beside their sources.
# -s: pytest would swallow the report of a sanitizer that ends the process.
sanitize: ## Run the suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZE)/src
	mkdir -p $(SANITIZE)/src
	tar -c --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar -x -C $(SANITIZE)/src
	test -x $(SANITIZE)/venv/bin/python || $(PYTHON) -m venv $(SANITIZE)/venv
	cd $(SANITIZE)/src && FF_FAST_SANITIZE=1 \
		../venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	cd $(SANITIZE)/src && \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		../venv/bin/python -m pytest -s --timeout 300 -n 2 --dist worksteal $(QUICK) $(ARGS)

wheel-test: build ## Build sdist and wheel, install them elsewhere, load the Lua from there
	$(PYTEST) -m packaging tests/packaging $(ARGS)

sdist: $(WHEELS)/.built ## Build the sdist in dist/ and check what PyPI will show of it
	rm -f dist/*.tar.gz
	$(WHEELS)/venv/bin/python -m build --sdist --outdir dist
	$(WHEELS)/venv/bin/python -m twine check --strict dist/*.tar.gz

# On Linux it needs Docker, to list them too little: make wheels ARGS=--print-build-identifiers.
wheels: $(WHEELS)/.built ## Build every wheel for this platform in dist/ and use each
	$(WHEELS)/venv/bin/python -m cibuildwheel --output-dir dist $(ARGS)

$(WHEELS)/.built: tools/wheels.txt
	test -x $(WHEELS)/venv/bin/python || $(PYTHON) -m venv $(WHEELS)/venv
	$(WHEELS)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r tools/wheels.txt
	touch $@

test-pythons: ## Run the whole suite on each Python: make test-pythons PYTHONS="python3.12 python3.14" ARGS=tests/unit
	$(PYTHON) tools/test_pythons.py $(PYTHONS) -- $(QUICK) $(ARGS)

bench: $(BENCH_BUILT) ## Measure against rivals: make bench ARGS=...
	$(BIN)/python -m bench $(ARGS)

bench-quick: $(BENCH_BUILT) ## Run every benchmark briefly, to see that it works
	$(BIN)/python -m bench --quick $(ARGS)

$(BENCH_BUILT): $(BUILT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

clean: ## Remove what was built and what tools have cached; .venv keeps its packages
	rm -rf build dist *.egg-info .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache $(BUILT) $(BENCH_BUILT)
	find ff_fast tests tools $(wildcard bench) -name __pycache__ -prune -exec rm -rf {} +
	find ff_fast -name '*.so' -delete
