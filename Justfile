# Recipes for people and for CI. `just` alone lists them.

python := env_var_or_default("PYTHON", "python3")
venv := env_var_or_default("VENV", ".venv")
bin := venv / "bin"

default:
    @just --list

# Make .venv with everything: training, export, benchmarks, checks
setup:
    {{ python }} -m venv {{ venv }}
    {{ bin }}/python -m pip install --quiet --upgrade pip
    {{ bin }}/python -m pip install --quiet --editable '.[all]'

# Build the built-in demo model, export it, ask it ten questions (writes ./demo-out)
demo *ARGS:
    {{ bin }}/tinyalign-edge demo {{ ARGS }}

# The default tests, under five minutes on two cores
test *ARGS:
    {{ bin }}/python -m pytest {{ ARGS }}

# The long tests too
test-slow *ARGS:
    {{ bin }}/python -m pytest -m '' {{ ARGS }}

# The runtime's tests in an environment of its own that holds only the oldest supported base dependencies
test-lowest:
    {{ python }} -m venv .venv-lowest
    .venv-lowest/bin/python -m pip install --quiet uv
    .venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable . 'pytest>=8.3'
    .venv-lowest/bin/python -m pytest tests/test_device.py

# Formatting, lint, types
check:
    {{ bin }}/ruff format --check .
    {{ bin }}/ruff check .
    {{ bin }}/mypy

# Format and mend what can be mended
fix:
    {{ bin }}/ruff format .
    {{ bin }}/ruff check --fix .

# Train, export and evaluate on the Caltech-101 photographs (needs TINYALIGN_SHARED); writes bench/results
bench:
    {{ bin }}/python -m tinyalign_edge.bench.caltech
    {{ bin }}/python -m tinyalign_edge.bench.stories
