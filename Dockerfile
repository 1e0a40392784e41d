# CPU image. The kernels choose their instruction set at run time, so one image runs well on any x86-64 or arm64 machine.
#   docker build -t rdpo --build-arg GIT_SHA="$(git rev-parse --short HEAD)" .
#   docker run -p 8080:8080 -v rdpo-data:/var/lib/rdpo/data -v "$PWD/models:/var/lib/rdpo/models:ro" rdpo
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# For `rdpo_build_info`.
ARG GIT_SHA=unknown
ENV RDPO_GIT_SHA=$GIT_SHA
RUN cargo build --release --locked --bin rdpo

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --home-dir /var/lib/rdpo rdpo \
    && install -d -o rdpo -g rdpo /var/lib/rdpo/data /var/lib/rdpo/models
COPY --from=build /src/target/release/rdpo /usr/local/bin/rdpo
USER rdpo
WORKDIR /var/lib/rdpo
VOLUME ["/var/lib/rdpo/data"]
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD curl --fail --silent http://127.0.0.1:8080/health || exit 1
ENTRYPOINT ["rdpo"]
CMD ["serve", "--host", "0.0.0.0"]
