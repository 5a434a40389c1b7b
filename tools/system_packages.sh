#!/bin/sh
# Usage: system_packages.sh PYTHON. Sees that what pip needs to build pyfuse3, and what a mount
# needs to run, is installed: as root on Debian installs what is missing, else says what it is.
set -eu
python=${1:-}
missing=

need() { missing="$missing $1"; }

command -v fusermount3 >/dev/null || need fuse3
command -v pkg-config >/dev/null || need pkg-config
pkg-config --exists fuse3 2>/dev/null || need libfuse3-dev
command -v cc >/dev/null || need gcc
echo '#include <stdlib.h>' | cc -E -x c - >/dev/null 2>&1 || need libc6-dev
if [ -z "$python" ]; then
  need python3; need python3-venv; need python3-dev
else
  "$python" -c 'import ensurepip' 2>/dev/null || need python3-venv
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
    || need python3-dev
fi
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "Missing system packages. On Debian or Ubuntu, as root: apt-get install$missing" >&2
  exit 1
fi
echo "installing system packages:$missing"
apt-get update -qq
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
