#!/usr/bin/env bash
# Writes the texts that the embedded model is made from into a directory: bash tools/fetch_corpus.sh DIRECTORY
#
# The King James Bible comes from the Debian package bible-kjv (installed if it is missing: needs root or sudo), the
# others from the test data in the source archive of the PyPI package brotli. All are in the public domain.
set -euo pipefail
to=${1:?a directory}
mkdir -p "$to"

if ! command -v bible > /dev/null; then
  as_root=()
  [[ $(id -u) == 0 ]] || as_root=(sudo -n)
  "${as_root[@]}" apt-get install -y -qq bible-kjv > /dev/null
fi
bible -l 9999 Gen1:1-Rev22:21 > "$to/bible.txt"

archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
python3 -m pip download --quiet --no-deps --no-binary=:all: --dest "$archive" brotli==1.2.1
tar -xzf "$archive"/brotli-*.tar.gz -C "$archive" --strip-components=3 --wildcards '*/tests/testdata/*.txt'
cp "$archive/plrabn12.txt" "$to/paradise_lost.txt"
cp "$archive/asyoulik.txt" "$to/as_you_like_it.txt"
cp "$archive/lcet10.txt" "$to/electronic_texts.txt"
cp "$archive/alice29.txt" "$to/alice.txt"
