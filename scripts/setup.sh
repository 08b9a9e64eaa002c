#!/usr/bin/env bash
# Makes .venv with everything a CPU host runs. Does nothing when it is already there and up to date.
# usage: scripts/setup.sh [--dev]     --dev adds what `make check` and `make test` need
set -euo pipefail
cd "$(dirname "$0")/.."
lists=(requirements/cpu.txt)
[ "${1:-}" = "--dev" ] && lists+=(requirements/dev.txt)
stamp=.venv/.installed
wanted=$(cat "${lists[@]}" pyproject.toml | sha256sum | cut -d' ' -f1)
# A .venv made with --dev serves a plain set-up as well, so the stamp holds one line per list that was installed.
if [ -f "$stamp" ] && grep -qx "$wanted" "$stamp"; then exit 0; fi

python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "dynamo-lite needs Python 3.11 or 3.12 (set PYTHON=…)" >&2; exit 1; }
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PY
[ -x .venv/bin/python ] || { echo "set-up: making .venv"; "$python" -m venv .venv; }

# torch's CPU build is not on PyPI. Where pip is configured with links of its own, they are trusted to have it;
# anywhere else the PyTorch project's CPU index is added.
links=()
if [ -z "${PIP_FIND_LINKS:-}" ] && ! .venv/bin/pip config get global.find-links >/dev/null 2>&1; then
  links=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
for list in "${lists[@]}"; do
  echo "set-up: installing $list ($(grep -vc '^#' "$list") packages; the first time takes a few minutes)"
  .venv/bin/pip install --no-deps --disable-pip-version-check -q "${links[@]}" -r "$list"
done
.venv/bin/pip install --no-deps --no-build-isolation --disable-pip-version-check -q -e .
cat requirements/cpu.txt pyproject.toml | sha256sum | cut -d' ' -f1 > "$stamp.new"
[ "${1:-}" = "--dev" ] && echo "$wanted" >> "$stamp.new"
mv "$stamp.new" "$stamp"
echo "set-up: done"
