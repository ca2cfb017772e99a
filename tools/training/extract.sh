#!/usr/bin/env bash
# extract.sh OUT: takes the training texts out of Debian packages, without installing them.
set -euo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq bible-kjv bible-kjv-text r-cran-janeaustenr
for package in *.deb; do dpkg -x "$package" x; done
(cd x/usr/lib && ../bin/bible -p . -l5000 'gen1:1-rev22:21' >"$out/kjv.txt" 2>/dev/null)
python3 "$here/rdata.py" x/usr/lib/R/site-library/janeaustenr/data/Rdata "$out"
ls -l "$out"
