#!/usr/bin/env bash
# A cluster of machines that are reached by ssh, while one program runs:
#
#     bash ssh.sh "host1 host2" program.py arguments
#
# dpool must be installed on all of them, and found by a command that ssh runs. This machine has the head and runs the
# program, unchanged; put its name among the hosts if it is to work, too.
set -euo pipefail

hosts=$1
shift
here=${DPOOL_HERE:-$(hostname)} # the name by which the hosts reach this machine
address=tcp://$here:${DPOOL_PORT:-7077}
export DPOOL_KEY_FILE=${DPOOL_KEY_FILE:-$HOME/.config/dpool/key}

[ -e "$DPOOL_KEY_FILE" ] || dpool keygen "$DPOOL_KEY_FILE" >&2
dpool head --bind "$address" >&2 &
trap 'dpool stop "$address" >&2; wait' EXIT

for host in $hosts; do
    # By stdin, for arguments can be seen by everyone. A key that is there stays there.
    ssh "$host" 'umask 077; mkdir -p ~/.config/dpool; [ -e ~/.config/dpool/key ] || cat > ~/.config/dpool/key' \
        < "$DPOOL_KEY_FILE"
    ssh "$host" "dpool node $address" < /dev/null &
done
until [ "$(dpool status "$address" | grep -c '^  node')" -ge "$(wc -w <<< "$hosts")" ]; do
    if [ "$(jobs -rp | wc -l)" -le "$(wc -w <<< "$hosts")" ]; then # the head, and an ssh for each node
        echo "the head or a node has ended: the lines above say why" >&2
        exit 1
    fi
    sleep 1
done

dpool run --address "$address" "$@"
