# Recipes for people and for CI. `just` alone lists them.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := env_var_or_default("PYTHON", "python3")
venv := env_var_or_default("VENV", ".venv")
bin := venv / "bin"
parallel := "-n auto --maxprocesses 4 --dist loadscope"  # tests in a process a core, four at most

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

# The default tests, about five minutes on two cores
test *ARGS:
    OMP_NUM_THREADS=1 {{ bin }}/python -m pytest {{ parallel }} {{ ARGS }}

# The long tests too
test-slow *ARGS:
    OMP_NUM_THREADS=1 {{ bin }}/python -m pytest {{ parallel }} -m '' {{ ARGS }}

# The oldest supported versions: the device's tests with the base dependencies alone, then all tests (torch apart)
test-lowest:
    {{ python }} -m venv .venv-base
    .venv-base/bin/python -m pip install --quiet uv
    .venv-base/bin/uv pip install --quiet --python .venv-base/bin/python --resolution lowest-direct --editable . 'pytest>=8.3'
    .venv-base/bin/python -m pytest tests/test_device.py tests/test_bundle.py tests/test_memory*.py \
        tests/test_prefix.py tests/test_generation.py tests/test_conversation.py tests/test_endurance.py tests/test_cli_chat.py \
        tests/test_bad_input.py tests/test_packed.py tests/test_latency.py
    {{ python }} -m venv .venv-lowest
    .venv-lowest/bin/python -m pip install --quiet uv 'torch>=2.6,<2.14'
    .venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
        --override <(.venv-lowest/bin/python -m pip freeze | grep '^torch==') --editable '.[all]'
    OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest {{ parallel }} -W ignore  # old versions of others warn of each other

# The device's part on an emulated aarch64, its answers beside this machine's (Debian: debootstrap proot qemu-user-static)
test-arm64 *ARGS:
    PYTHON={{ bin }}/python tests/arm64.sh {{ ARGS }}

# Formatting, lint, types
check:
    {{ bin }}/ruff format --check .
    {{ bin }}/ruff check .
    {{ bin }}/mypy

# Format and mend what can be mended
fix:
    {{ bin }}/ruff format .
    {{ bin }}/ruff check --fix .

# Make every figure of the README anew (needs TINYALIGN_SHARED); writes bench/results
bench:
    {{ bin }}/python -m tinyalign_edge.bench.demo
    {{ bin }}/python -m tinyalign_edge.bench.caltech --steps 800 --memory tokens latents
    {{ bin }}/python -m tinyalign_edge.bench.teach runs/caltech/tokens-bundle --record
    {{ bin }}/python -m tinyalign_edge.bench.memory_size
    {{ bin }}/python -m tinyalign_edge.bench.stories
    {{ bin }}/python -m tinyalign_edge.bench.formats
    {{ bin }}/python -m tinyalign_edge.bench.budget
    {{ bin }}/python -m tinyalign_edge.bench.train_step

# What the memory buys, in parts that go on where they were stopped: hours of one core (needs TINYALIGN_SHARED);
# writes bench/results/study, figures and tables of docs/study.md
study *ARGS:
    {{ bin }}/python -m tinyalign_edge.bench.study {{ ARGS }}

# What the memory finds, and how fast, beside FAISS, on an idle machine (writes bench/results/recall.json)
recall *ARGS:
    {{ bin }}/python -m tinyalign_edge.bench.recall {{ ARGS }}
    {{ bin }}/python -m tinyalign_edge.bench.retrieval_share

# Make docs/preprocessing.md anew: each encoder's own image processor, on photographs (needs TINYALIGN_SHARED)
preprocessing:
    {{ bin }}/python -m tinyalign_edge.bench.preprocessing

# Make docs/models.md anew: every family on a tiny model, against torch
models:
    {{ bin }}/python -m tinyalign_edge.bench.models

# Speed beside onnxruntime-genai, llama.cpp, optimum and torch, on an idle machine (writes bench/results/peers.json)
peers *ARGS: peers-setup
    {{ bin }}/python -m tinyalign_edge.bench.peers.run {{ ARGS }}

# The environments of engines that need their own; llama.cpp is compiled for this processor (cmake, a C++ compiler)
peers-setup:
    [ -e runs/peers/venv-genai/done ] || {{ python }} -m venv --clear runs/peers/venv-genai
    [ -e runs/peers/venv-genai/done ] || runs/peers/venv-genai/bin/python -m pip install --quiet \
        onnxruntime-genai onnx onnx-ir 'transformers>=5' 'torch>=2.6,<2.14'
    touch runs/peers/venv-genai/done
    [ -e runs/peers/venv-llama/done ] || {{ python }} -m venv --clear runs/peers/venv-llama
    [ -e runs/peers/venv-llama/done ] || CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON -DLLAVA_BUILD=OFF}" \
        runs/peers/venv-llama/bin/python -m pip install --quiet --no-binary llama-cpp-python \
        llama-cpp-python gguf safetensors
    touch runs/peers/venv-llama/done

# Latency of the demo's, the Caltech and a full-shape bundle, and the first token beside llama.cpp and the encoder in
# float32, on an idle machine (writes bench/results and the README's tables; the first two come from `just bench`)
latency *ARGS: peers-setup
    {{ bin }}/python -m tinyalign_edge.bench.first_token
    {{ bin }}/python -m tinyalign_edge.bench.latency {{ ARGS }}

# What the int8 cache gains in decoding, and the peak memory of an export, on an idle machine (writes bench/results)
costs:
    {{ bin }}/python -m tinyalign_edge.bench.kv
    {{ bin }}/python -m tinyalign_edge.bench.export_memory

# Cold start and memory of a process, and what drafts save, on an idle machine (needs `just bench`; writes bench/results)
runtime:
    {{ bin }}/python -m tinyalign_edge.bench.cold_start
    {{ bin }}/python -m tinyalign_edge.bench.caption_drafts
    {{ bin }}/python -m tinyalign_edge.bench.caption_drafts --precision fp32
    {{ bin }}/python -m tinyalign_edge.bench.note_drafts
    {{ bin }}/python -m tinyalign_edge.bench.drafts runs/caltech/tokens-bundle --name caltech-drafts \
        --data "${TINYALIGN_SHARED:-../shared}/data/caltech101/test.json" \
        --images "${TINYALIGN_SHARED:-../shared}/data/caltech101"
