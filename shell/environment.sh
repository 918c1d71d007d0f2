# Part of launch.sh: the virtual environment.
# shellcheck shell=bash

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

check_python() {
  new_enough python ||
    fail "the active environment $VIRTUAL_ENV has a Python older than 3.11; deactivate it or use another."
}

use_environment() {
  local environment="${VIRTUAL_ENV:-}"
  # conda's base is active in every shell of many users, who do not want our pins in it.
  if [ -z "$environment" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then environment="${CONDA_PREFIX:-}"; fi
  export VIRTUAL_ENV="${environment:-$root/.venv}"
  export PATH="$VIRTUAL_ENV/bin:$PATH"
}

is_set_up() { cmp -s requirements.txt "$VIRTUAL_ENV/.requirements-installed"; }

make_environment() {
  if [ "$VIRTUAL_ENV" = "$root/.venv" ] && [ ! -x "$VIRTUAL_ENV/bin/pip" ]; then
    local python="${PYTHON:-python3}"
    new_enough "$python" ||
      fail "$python is missing or older than Python 3.11. Set PYTHON to a newer one: PYTHON=python3.12 ./launch.sh"
    echo "Making the environment $VIRTUAL_ENV" >&2
    "$python" -m venv "$VIRTUAL_ENV" ||
      fail "$python cannot make $VIRTUAL_ENV; on Debian and Ubuntu: apt install python3-venv"
  fi
  check_python
  echo "Installing requirements.txt into $VIRTUAL_ENV (some minutes the first time)" >&2
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$VIRTUAL_ENV/.requirements-installed"
}

set_up() {
  use_environment
  if ! is_set_up; then # one at a time: the jobs of an array may all come here at once
    (
      if command -v flock >/dev/null; then flock 9 || true; fi
      if ! is_set_up; then make_environment; fi
    ) 9>>requirements.txt
  fi
  check_python
}
