#!/usr/bin/env bash
# Every way to install the package, each in its own virtual environment under a temporary folder:
#
#   sdist -> wheel      the wheel is tagged for this platform and its extension does not depend on torch
#   that wheel          passes the everyday tests under each torch version of TORCH_VERSIONS
#   pip install .       the extension, the kernels and the command are there
#   pip install -e .    the same, from another working directory
#   no compiler         installs as a pure-Python wheel, and `anima-fast info` says why
#
# Run by `make test-install`. The static GPU budgets are left out: they belong to one Triton version, and each
# torch brings its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=$(realpath -s "${PYTHON:-python3}") # with `build`, as in the .venv of the Makefile
TORCH_INDEX=${TORCH_INDEX:-}
TORCH_VERSIONS=${TORCH_VERSIONS:-2.13.0 2.14.1}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
mkdir "$tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tree"

step() { printf '\n==> %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

new_venv() { # folder, torch version
    "$PYTHON" -m venv "$work/$1"
    local pip=("$work/$1/bin/python" -m pip --disable-pip-version-check install -q)
    if [[ $TORCH_INDEX ]]; then
        "${pip[@]}" --no-deps "torch==$2" --extra-index-url "$TORCH_INDEX" --timeout 10 --retries 1 ||
            "${pip[@]}" --no-deps "torch==$2"
    fi
    # Whatever is installed next must not move torch to another version.
    echo "torch==$2" >"$work/$1/constraints.txt"
    "${pip[@]}" -c "$work/$1/constraints.txt" torch
}

pip_install() { # venv, arguments of pip install
    local venv=$work/$1
    shift
    "$venv/bin/python" -m pip --disable-pip-version-check install -q -c "$venv/constraints.txt" "$@"
}

check_install() { # venv, "extension" or "pure"
    local python=$work/$1/bin/python
    (cd "$work" && "$python" - "$2") <<'EOF'
import importlib.util, json, pathlib, sys
import anima_fast, anima_fast.kernels.regional_attention

built = json.loads((pathlib.Path(anima_fast.__file__).parent / "_build.json").read_text(encoding="utf-8"))
found = importlib.util.find_spec("anima_fast._C") is not None
print(anima_fast.__file__, "extension:", found, "reason:", built["reason"])
assert found == built["extension"] == (sys.argv[1] == "extension")
if found:
    import anima_fast._C
EOF
    (cd "$work" && "$work/$1/bin/anima-fast" info)
}

export ANIMA_FAST_REQUIRE_EXT=1

step "build the sdist, and the wheel from it"
(cd "$tree" && "$PYTHON" -m build -o "$work/dist" . >"$work/build.log" 2>&1) || { cat "$work/build.log"; fail build; }
ls "$work/dist"
wheel=$(ls "$work"/dist/anima_fast-*.whl)
[[ $wheel == *-none-any.whl ]] && fail "a wheel with the extension is tagged as pure Python"
"$PYTHON" -m zipfile -e "$wheel" "$work/unpacked"
if command -v ldd >/dev/null; then
    ldd "$work"/unpacked/anima_fast/_C*.so | tee "$work/ldd.txt"
    grep -E 'libtorch|libc10|libcuda' "$work/ldd.txt" && fail "the extension depends on torch or CUDA libraries"
fi

for version in $TORCH_VERSIONS; do
    step "the wheel under torch $version"
    new_venv "torch-$version" "$version"
    pip_install "torch-$version" "${wheel}[test]"
    check_install "torch-$version" extension
    # Away from the source tree, so that what is imported is what the wheel installed.
    mkdir "$work/run-$version"
    cp -r "$tree/tests" "$tree/examples" "$tree/benchmarks" "$tree/pyproject.toml" "$work/run-$version"
    (cd "$work/run-$version" && "$work/torch-$version/bin/python" -m pytest -q --ignore=tests/static)
done

venv=torch-${TORCH_VERSIONS%% *}
step "pip install ."
pip_install "$venv" --force-reinstall --no-deps "$tree"
check_install "$venv" extension

step "pip install -e ."
pip_install "$venv" --force-reinstall --no-deps -e "$tree"
check_install "$venv" extension

step "pip install . without a compiler"
env -u ANIMA_FAST_REQUIRE_EXT CC=/nonexistent "$work/$venv/bin/python" -m pip wheel -q --no-deps -w "$work/pure" "$tree"
ls "$work/pure"
[[ $(ls "$work/pure") == *-py3-none-any.whl ]] || fail "a wheel without the extension must be tagged py3-none-any"
pip_install "$venv" --force-reinstall --no-deps "$work"/pure/*.whl
check_install "$venv" pure

step "all ways of installing work"
