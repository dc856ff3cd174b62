#!/bin/sh
# What the images install, in the versions of requirements.lock; the tests run it as the Dockerfile does.
#   install.sh packages VENV [EXTRA...]   a virtual environment with all that cmacc needs, and those extras of pyproject.toml
#   install.sh code VENV                  cmacc itself, into one that may lack all it needs
set -eu
cd "$(dirname "$0")/.."
step=${1:?say packages or code} venv=${2:?name the folder of the virtual environment}
shift 2
test -x "$venv/bin/python" || uv venv --quiet --no-managed-python --python "$(command -v python3)" "$venv"

case $step in
  packages)
    for extra; do set -- "$@" --extra "$extra"; shift; done
    uv pip install --quiet --python "$venv/bin/python" --constraints requirements.lock --requirements pyproject.toml "$@"
    ;;
  code)
    uv pip install --quiet --python "$venv/bin/python" --no-deps --build-constraints requirements.lock .
    ;;
  *)
    echo "install.sh: $step is no step; say packages or code" >&2
    exit 2
    ;;
esac
