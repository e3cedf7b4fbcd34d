#!/bin/sh
# Whether a container is well, for the engine that runs it. A Ray node is well if its own agent says so, of the raylet
# and on the head also of the control store; the agent asks for no token here. Anything else is well while it runs,
# which the engine sees by itself. Judged is the container's first process, or the one named; the agent listens at
# Ray's usual port, or at the one named.
command=$(tr '\0' ' ' <"/proc/${1:-1}/cmdline") || exit 1
case "$command" in
"") exit 1 ;; # it has ended, and nobody has noticed
*"ray start "*) wget --quiet --tries=1 --timeout=5 --output-document=/dev/null "http://127.0.0.1:${2:-52365}/api/healthz" || exit 1 ;;
esac
