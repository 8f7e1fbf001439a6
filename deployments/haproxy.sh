#!/bin/sh
# HAProxy as Ray Serve starts it, made private to this machine: Serve's template binds the statistics and
# metrics ports to every interface and lets every user into the admin socket. It also keeps from the Routers
# whom a request comes from: the client's address is appended to X-Forwarded-For, to the right of whatever
# the client itself wrote there. This runs in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH), mends the
# configuration, and becomes HAProxy.
set -eu
private="${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}\\|${RAY_SERVE_HAPROXY_STATS_PORT:-8404}"
previous=""
for argument in "$@"; do
  if [ "$previous" = "-f" ] && [ -f "$argument" ]; then
    sed -e "s/^\( *bind \)\*\{0,1\}:\($private\)\( .*\)\{0,1\}\$/\1127.0.0.1:\2\3/" \
        -e 's/^\( *stats socket .* mode \)666 /\1600 /' \
        -e '/^defaults/,/^[a-z]/{
          /^ *option forwardfor/d
          s/^\( *\)mode http *$/&\
\1option forwardfor/
        }' "$argument" >"$argument.private"
    cat "$argument.private" >"$argument"
    rm -f "$argument.private"
  fi
  previous="$argument"
done
exec "$BLAZE_HAPROXY_BINARY" "$@"
