#!/usr/bin/env bash
# Runs every variant of kvstore.pml through Spin and compares what it finds with what it must find.
#
#   docs/protocol/check.sh               all that take less than a minute; 0 if all are as expected
#   docs/protocol/check.sh --full        the large ones too: up to an hour and 12 GB of memory
#   docs/protocol/check.sh --show NAME   a short way to what a variant finds, event by event
set -euo pipefail

model=$(dirname "$(readlink -f "$0")")/kvstore.pml
small="-DWRITERS=1 -DREADERS=1"

# name | macros | what Spin finds: nothing, or which promise is broken
variants="
protocol          | -DOWNERS -DWRITERS=2 -DREADERS=1         | nothing
two readers       | -DOWNERS -DWRITERS=1 -DREADERS=2         | nothing
torn transfers    | -DOWNERS -DPARTS=2 $small                | nothing
hostile, digest   | -DHOSTILE -DDIGEST $small                | nothing
stale, digest     | -DSTALE_PEER -DDIGEST $small             | nothing
no quarantine, digest | -DNO_QUARANTINE -DDIGEST $small      | nothing
no confirm, digest | -DNO_CONFIRM -DDIGEST $small            | nothing
no confirm        | -DNO_CONFIRM $small                      | wrong bytes are used
no quarantine     | -DNO_QUARANTINE $small                   | wrong bytes are used
two owners        | -DNO_QUARANTINE -DOWNERS $small          | a slot has two owners
hostile           | -DHOSTILE $small                         | wrong bytes are used
stale peer        | -DSTALE_PEER $small                      | wrong bytes are used
evict leased      | -DEVICT_LEASED $small                    | wrong bytes are used
early acknowledge | -DACK_EARLY $small                       | wrong bytes are used
early seal        | -DSEAL_EARLY $small                      | wrong bytes are used
late seal         | -DLATE_SEAL $small                       | a key has two slots
same ids          | -DSAME_IDS -DDIGEST $small               | wrong bytes are used
no hold           | -DNO_HOLD -DDIGEST $small                | wrong bytes are used
leak              | -DLEAK $small                            | something is kept for ever
"
full_variants="
torn, two writers | -DOWNERS -DPARTS=2 -DWRITERS=2 -DREADERS=1 | nothing
hostile, two writers | -DHOSTILE -DDIGEST -DWRITERS=2 -DREADERS=1 | nothing
all               | -DOWNERS -DWRITERS=2 -DREADERS=2         | nothing
"

need() {
    command -v "$1" >/dev/null || { echo "check.sh: $2" >&2; exit 2; }
}

# build MACROS CFLAGS: makes ./pan in the current folder.
build() {
    # shellcheck disable=SC2086
    spin -a $1 kvstore.pml && ${CC:-cc} -O2 -w -DSAFETY -DCOLLAPSE -DMEMLIM=12000 $2 -o pan pan.c
}

# found LOG: what a run of pan found, in the words of the tables.
found() {
    case $(grep -m1 '^pan:1:' "$1") in
        *'read[r].memory'*) echo "wrong bytes are used" ;;
        *holds*) echo "a slot has two owners" ;;
        *'!(any)'*) echo "a key has two slots" ;;
        *'.state=='* | *'.on)'* | *num_stopped*) echo "something is kept for ever" ;;
        ?*) grep -m1 '^pan:1:' "$1" ;;
        *)
            if grep -qE 'max search depth too small|memory limit|out of memory' "$1"; then
                echo "the search is not complete"
            elif grep -q 'errors: 0' "$1"; then
                echo "nothing"
            else
                tail -n1 "$1"
            fi
            ;;
    esac
}

# run NAME MACROS EXPECTED: one line of the table; 1 when the outcome is another.
run() {
    build "$2" ""
    ./pan "-m$max_depth" >log 2>&1 || true
    local outcome states seconds verdict="as expected"
    outcome=$(found log)
    states=$(awk '/states, stored/ {print $1}' log)
    seconds=$(awk '/elapsed time/ {print $4}' log)
    [ "$outcome" = "$3" ] || verdict="EXPECTED: $3"
    printf '%-22s %11s states %8s s  %-27s %s\n' \
        "$1" "${states:--}" "${seconds:--}" "$outcome" "$verdict"
    [ "$outcome" = "$3" ]
}

# show NAME: what the model says on a short way to the error.
show() {
    local name macros expected depth
    while IFS='|' read -r name macros expected; do
        [ "$(xargs <<<"$name")" = "$1" ] || continue
        build "$macros" -DREACH
        for depth in $(seq 20 4 60); do
            ./pan "-m$depth" >log 2>&1 || true
            if grep -q '^pan:1:' log; then
                # shellcheck disable=SC2086
                spin -t $macros kvstore.pml | grep -E '^ *(store|network|writer|reader)'
                found log
                return
            fi
        done
        echo "check.sh: '$1' finds nothing in 60 steps; in any number:$expected" >&2
        return 1
    done <<<"$variants"
    echo "check.sh: no variant is called '$1'" >&2
    return 2
}

need spin "Spin is missing (Debian, Ubuntu: apt-get install spin; https://spinroot.com)"
need "${CC:-cc}" "a C compiler is missing (Debian, Ubuntu: apt-get install gcc), or set CC"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$model" "$folder" && cd "$folder"

max_depth=3000000
case ${1:-} in
    --show) show "${2:?NAME}"; exit ;;
    --full) variants+=$full_variants max_depth=30000000 ;;
    "") ;;
    *) echo "check.sh: --full, --show NAME or nothing; not '$1'" >&2; exit 2 ;;
esac
num_wrong=0
while IFS='|' read -r name macros expected; do
    [ -n "$name" ] || continue
    run "$(xargs <<<"$name")" "$macros" "$(xargs <<<"$expected")" || num_wrong=$((num_wrong + 1))
done <<<"$variants"
[ $num_wrong = 0 ] || { echo "check.sh: $num_wrong variants are not as expected" >&2; exit 1; }
