# PostgreSQL for MLflow (profile `postgres`), from Debian's own packages on the base that the other image has.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends postgresql-15 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
COPY docker/postgres.sh /usr/local/bin/facefed-postgres
RUN useradd --uid 10001 --home-dir /var/lib/facefed --shell /usr/sbin/nologin facefed \
    && install -d -o facefed -g facefed -m 0700 /var/lib/facefed /database-key
USER 10001:10001
WORKDIR /var/lib/facefed
CMD ["facefed-postgres"]
