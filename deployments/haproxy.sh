#!/bin/sh
# HAProxy as Ray Serve starts it, made private to this machine: Serve's template binds the statistics and
# metrics ports to every interface and lets every user into the admin socket. It also keeps from the Routers
# whom a request comes from: the client's address is appended to X-Forwarded-For, to the right of whatever
# the client itself wrote there. And it answers as a Router would where none can: Serve says 500 in plain text
# when they are out of reach, and 404 of every path before it knows of any. This runs in HAProxy's place
# (RAY_SERVE_HAPROXY_BINARY_PATH), mends the configuration, and becomes HAProxy.
set -eu

answer() { # status, further headers, type, code, message: one of HAProxy's own answers, as OpenAI's error object
  printf "%s content-type application/json string '%s'%s" "$1" \
    "{\"error\":{\"message\":\"$5\",\"type\":\"$3\",\"param\":null,\"code\":\"$4\"}}" "$2"
}
lost=$(answer 502 '' server_error router_lost 'The Router was lost before it had answered.')
none=$(answer 503 ' hdr retry-after 1' overloaded_error overloaded 'No Router can be reached.')
late=$(answer 504 '' timeout_error deadline_exceeded 'The Router did not answer in time.')

private="${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}\\|${RAY_SERVE_HAPROXY_STATS_PORT:-8404}"
previous=""
for argument in "$@"; do
  if [ "$previous" = "-f" ] && [ -f "$argument" ]; then
    unknown=""
    if ! grep -q '^ *use_backend ' "$argument"; then
      unknown="/^backend default_backend/,/^[a-z]/s|^\( *http-request return status \)404 .*|\1$none|"
    fi
    sed -e "s/^\( *bind \)\*\{0,1\}:\($private\)\( .*\)\{0,1\}\$/\1127.0.0.1:\2\3/" \
        -e 's/^\( *stats socket .* mode \)666 /\1600 /' \
        -e "s|^\( *\)errorfile 502 .*|\1http-error status $lost|" \
        -e "s|^\( *\)errorfile 503 .*|\1http-error status $none|" \
        -e "s|^\( *\)errorfile 504 .*|\1http-error status $late|" \
        -e "$unknown" \
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
