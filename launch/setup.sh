# Sourced by launch/demo.sh and tests/run.sh from the repository root: a virtual environment in .venv with all that the
# project needs. SKIP_SETUP=1 uses the environment that is active.
if [ -z "${SKIP_SETUP:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
    # Installed once for every state of pyproject.toml.
    if ! cmp -s pyproject.toml .venv/installed-pyproject.toml; then
        python -m pip install --quiet --upgrade pip
        python -m pip install --quiet --editable '.[keops,remote,deepspeed,dev]'
        cp pyproject.toml .venv/installed-pyproject.toml
    fi
fi
