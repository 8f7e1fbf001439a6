#!/bin/sh
# HAProxy as Ray Serve starts it, made private to this machine: Serve's template binds the statistics and
# metrics ports to every interface and lets every user into the admin socket. This runs in HAProxy's place
# (RAY_SERVE_HAPROXY_BINARY_PATH), mends the configuration, and becomes HAProxy.
set -eu
previous=""
for argument in "$@"; do
  if [ "$previous" = "-f" ] && [ -f "$argument" ]; then
    sed -e 's/^\( *bind \)\*\{0,1\}:\([0-9]\)/\1127.0.0.1:\2/' \
        -e 's/^\( *stats socket .* mode \)666 /\1600 /' "$argument" >"$argument.private"
    cat "$argument.private" >"$argument"
    rm -f "$argument.private"
  fi
  previous="$argument"
done
exec "$BLAZE_HAPROXY_BINARY" "$@"
