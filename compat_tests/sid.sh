#!/bin/sh
# Runs compat_tests on the newest Pythons of Debian: makes a chroot of sid, installs python3.14 and python3.15 with
# their test suites, and runs `python -m compat_tests` there. Never leaves a mount behind: all are made in a mount
# namespace of their own, which ends with the script. Called by people, as root; not by CI.
#
#   compat_tests/sid.sh [options of python -m compat_tests ...]
#
# SID_ROOT is the folder of the chroot (kept, and used again), SID_PYTHONS the versions, SID_MIRROR the archive.
set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
root=${SID_ROOT:-${TMPDIR:-/tmp}/dpool-sid}
versions=${SID_PYTHONS:-3.14 3.15}
mirror=${SID_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Component: main' | grep '/debian/$' | head -n 1)}

if [ "$(id -u)" != 0 ] || ! command -v debootstrap > /dev/null; then
    echo "this needs root and debootstrap (apt install debootstrap)" >&2
    exit 2
fi
if [ -z "${SID_INSIDE:-}" ]; then
    exec env SID_INSIDE=1 unshare --mount --pid --fork --kill-child --propagation private "$0" "$@"
fi

if [ ! -e "$root/complete" ]; then
    debootstrap --variant=minbase sid "$root" "$mirror"
    touch "$root/complete"
fi
mkdir -p "$root/checkout"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs shm "$root/dev/shm"
mount -t tmpfs tmp "$root/tmp"
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"

inside() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"; }

# A mirror may lag behind: the archive's signature is checked, its age is not.
inside apt-get update -q -o Acquire::Check-Valid-Until=false
# The dependencies come from Debian where they are built for the version, else from pip.
inside apt-get install -qy --no-install-recommends \
    python3-pip python3-cloudpickle python3-zmq python3-msgspec > "$root/apt.log" 2>&1 ||
    { tail "$root/apt.log"; exit 1; }

worst=0
for version in $versions; do
    python=python$version
    echo "=== $python"
    if ! inside apt-get install -qy --no-install-recommends "$python" "lib$python-testsuite" > "$root/apt.log" 2>&1; then
        echo "sid has no $python: $(tail -n 1 "$root/apt.log")"
        continue
    fi
    if ! inside "$python" -c 'import cloudpickle, zmq, msgspec' 2> /dev/null; then
        inside "$python" -m pip install -q --break-system-packages --root-user-action=ignore \
            cloudpickle pyzmq msgspec || echo "some dependencies of dpool are not there for $python"
    fi
    inside env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/checkout sh -c 'cd /tmp && exec "$@"' sh \
        "$python" -m compat_tests "$@" || worst=$?
done
exit "$worst"
