# Sets PYTHON to an interpreter that has everything in requirements.txt. Sourced by run_all.sh and tests/run.sh.
#
# An active environment that already satisfies the requirements is used as it is; otherwise .venv is made beside this
# file, once, and filled by pip (about 5 GB with torch's CUDA libraries). REQUIREMENTS names another list of packages.

setup_environment() {
  local here requirements stamp system
  here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || return 1
  requirements=$here/${REQUIREMENTS:-requirements.txt}
  system=$(command -v python3 || command -v python) || { echo "error: no python3 found; install Python 3.10 or newer" >&2; return 1; }

  satisfied() { # does this interpreter have what the list asks for?
    "$1" - "$requirements" <<'PY' 2>/dev/null
import importlib.metadata, pathlib, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
def check(path):
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            check(path.parent / line[2:].strip())
        elif line:
            wanted = Requirement(line)
            found = importlib.metadata.version(wanted.name)
            if not wanted.specifier.contains(found, prereleases=True):
                sys.exit(1)
check(pathlib.Path(sys.argv[1]))
PY
  }

  if satisfied "$system"; then
    PYTHON=$system
    return 0
  fi
  PYTHON=$here/.venv/bin/python
  stamp=$here/.venv/.installed # made when pip has ended well, so that a killed installation is repeated
  if [ -e "$stamp" ] && [ -x "$PYTHON" ] && satisfied "$PYTHON"; then
    return 0
  fi
  "$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $system is $("$system" --version 2>&1); Python 3.10 or newer is needed" >&2; return 1; }
  echo "Installing $(basename "$requirements") into $here/.venv (once; some minutes and about 5 GB) ..." >&2
  "$PYTHON" -m pip --version > /dev/null 2>&1 || "$system" -m venv --clear "$here/.venv" || { echo "error: cannot make $here/.venv; is python3-venv installed?" >&2; return 1; }
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || {
    echo "error: pip could not install $requirements; repeat the command when the network is back" >&2; return 1; }
  touch "$stamp"
}

setup_environment
