# Everyday commands. `just` alone lists them.

default:
    @just --list

# Install the package for development, with everything the tests need
install:
    python -m pip install -e ".[test]"

# The quick tests
test *args:
    python -m pytest {{args}}

# The tests that take longer than about ten seconds each
test-slow *args:
    python -m pytest -m slow {{args}}

# Style and likely mistakes
lint:
    ruff check .
    ruff format --check .

# Rewrite in the house style
format:
    ruff check --fix .
    ruff format .

# Static types
types:
    mypy

# How long each help page takes to appear, in seconds (the house rule: under 0.4)
help-times:
    #!/usr/bin/env bash
    for command in "" "init" "info" "runs" "runs list" "runs show" "runs replay"; do
        TIMEFORMAT="%R  physformer $command --help"
        time physformer $command --help > /dev/null
    done
