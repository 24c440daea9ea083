# Owns .venv in the checkout: finds a CPython >= 3.11, makes the environment, installs dpool (editable) with an extra.
# Never touches another environment, never asks a question, prints nothing but what goes wrong and one line on setting up.
# Sourced by examples/run and tests/run, which then call ready_venv EXTRA and use "$VENV_PYTHON".

find_python() {
    # A name on the PATH may be a stub that starts nothing, or a Python without venv: try it before believing it.
    local name
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip
sys.exit(sys.implementation.name != "cpython" or sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1; then
            echo "$name"
            return 0
        fi
    done
    echo "dpool needs CPython 3.11 or newer with venv; none of python3.13, 3.12, 3.11 or python3 is one." \
         "Install one (on Debian: python3 and python3-venv), or name it: PYTHON=/path/to/python bash ..." >&2
    return 1
}

ready_venv() {
    local root=$1 extra=$2 python stamp wanted
    local venv=$root/.venv
    VENV_PYTHON=$venv/bin/python
    export PIP_DISABLE_PIP_VERSION_CHECK=1

    # Two runs at once would install into one environment: the second waits. Any file both can open serves as the lock.
    local lock
    exec {lock}<"$root/pyproject.toml"
    if command -v flock >/dev/null; then flock "$lock"; fi

    if ! "$VENV_PYTHON" -c 'import pip' </dev/null >/dev/null 2>&1; then
        python=$(find_python) || { exec {lock}<&-; return 1; }
        echo "setting up .venv with $("$python" --version 2>&1) ..." >&2
        "$python" -m venv --clear "$venv" </dev/null || { exec {lock}<&-; return 1; }
    fi

    # One stamp an extra: what was installed for it. It is written last, so an interrupted set-up is done again.
    stamp=$venv/dpool-${extra:-plain}.stamp
    wanted=$("$VENV_PYTHON" --version; echo "$root"; cat "$root/pyproject.toml")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing dpool${extra:+[$extra]} into .venv ..." >&2
        # What pip says matters only when it fails.
        if ! "$VENV_PYTHON" -m pip install --quiet --editable "$root${extra:+[$extra]}" </dev/null >"$venv/pip.log" 2>&1
        then
            cat "$venv/pip.log" >&2
            echo "could not install dpool${extra:+[$extra]} into .venv; pip's words are above" >&2
            exec {lock}<&-
            return 1
        fi
        printf '%s' "$wanted" >"$stamp"
    fi
    exec {lock}<&-
}
