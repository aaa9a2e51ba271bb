# comfyd in a container that runs as a user without rights, on a root file system that may be read-only.
#
#   docker build -t comfyd .
#   docker run -p 127.0.0.1:8000:8000 -v comfyd:/data -e COMFYUI_URL=http://HOST:8188 comfyd
#
# It needs no configuration file. To use one, mount it as /etc/comfyd/comfyd.toml; the environment beats it, and
# that includes the three COMFYD__ names that are set below.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/comfyd
WORKDIR /src
# Every package, of the service with the drivers of all storages and of its build, by hash; this layer is rebuilt
# only when a lock changes.
COPY requirements-all.lock requirements-build.lock ./
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes -r requirements-build.lock \
 && /opt/comfyd/bin/pip install --require-hashes -r requirements-all.lock
COPY pyproject.toml README.md LICENSE comfyd.toml ./
COPY workflows ./workflows
COPY comfyd ./comfyd
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/comfyd/bin/pip install --no-deps /wheels/comfyd-*.whl

FROM python:3.13-slim
RUN groupadd --gid 10001 comfyd \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin comfyd \
 && install --directory --owner=comfyd --group=comfyd --mode=0700 /data \
 && install --directory /etc/comfyd
COPY --from=build /opt/comfyd /opt/comfyd
# Templates of your own: mount a folder over this one.
COPY workflows /workflows

# In a container 127.0.0.1 is the container alone, so comfyd listens on all its addresses, and --insecure below
# says that this is meant: this version has no API keys. Who can reach it is decided outside, by what is
# published (127.0.0.1 above) and by the network. Put a proxy that authenticates before it reaches further.
ENV PATH=/opt/comfyd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    COMFYD__SERVER__HOST=0.0.0.0 \
    COMFYD__DATA__DIR=/data \
    COMFYD__WORKFLOWS__DIR=/workflows

USER 10001:10001
WORKDIR /etc/comfyd
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["python", "-c", "import http.client, os; connection = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('COMFYD__SERVER__PORT') or 8000), timeout=4); connection.request('GET', '/api/health'); raise SystemExit(connection.getresponse().status != 200)"]
# `docker run comfyd check` and every other command work likewise.
ENTRYPOINT ["comfyd"]
CMD ["serve", "--insecure"]
