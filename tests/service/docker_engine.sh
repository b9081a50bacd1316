#!/usr/bin/env bash
# A Docker engine of our own in FOLDER, no registry and no network needed: its socket is
# FOLDER/docker.sock. Installs Debian's docker.io if there is no dockerd and we are root.
# usage: docker_engine.sh start|stop|kill FOLDER
set -euo pipefail
folder=$(mkdir -p "${2:?folder}" && cd "$2" && pwd)

running() { [ -e "$folder/docker.pid" ] && kill -0 "$(cat "$folder/docker.pid")" 2>/dev/null; }
answers() { curl -fs --max-time 2 --unix-socket "$folder/docker.sock" http://docker/_ping >/dev/null 2>&1; }

start() {
    if ! command -v dockerd >/dev/null; then
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "no dockerd" >&2; exit 1; }
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
            docker.io; } >"$folder/install.log" 2>&1 || { echo "docker.io does not install" >&2; exit 1; }
    fi
    answers && return
    rm -f "$folder/docker.pid"
    # gVisor, where it is installed; by ptrace, for the rest may want what a container lacks
    runtimes='{}'
    if runsc=$(command -v runsc); then
        runtimes='{"runsc": {"path": "'$runsc'", "runtimeArgs": ["--platform=ptrace", "--network=none"]}}'
    fi
    echo '{"runtimes": '"$runtimes"'}' >"$folder/daemon.json"
    # neither bridge nor firewall: sandboxes have no network
    setsid dockerd -H "unix://$folder/docker.sock" --data-root "$folder/data" --exec-root "$folder/exec" \
        --pidfile "$folder/docker.pid" --config-file "$folder/daemon.json" \
        --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none --exec-opt native.cgroupdriver=cgroupfs --log-level=warn \
        >>"$folder/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 300); do answers && return; sleep 0.1; done
    tail -n 5 "$folder/dockerd.log" >&2
    exit 1
}

finish() { # a signal to the engine, then wait for it
    running || return 0
    pid=$(cat "$folder/docker.pid")
    kill "-$1" "$pid"
    for _ in $(seq 200); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    exit 1
}

case "$1" in
start) start ;;
stop) finish TERM ;;
kill) finish KILL ;;
*) exit 2 ;;
esac
