# docker run --rm -v MODEL:/model:ro -v OUT:/out ream-stream compress /model /out/smaller --keep 75%
#
# Exit statuses are those of the command (docs/reference/cli.md); docker's own are 125 to 127.
# Files are written as the user below; for your own: --user "$(id -u):$(id -g)".
# The root file system may be read-only: --read-only --tmpfs /tmp -v WORK:/work
FROM python:3.11-slim

# torch for CPUs; with --build-arg PIP_EXTRA_INDEX_URL= it is the package index's, with CUDA
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# The pins are all that the large layer depends on, so a change of code does not rebuild it.
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir --disable-pip-version-check -r /tmp/constraints.txt

COPY pyproject.toml README.md LICENSE /tmp/source/
COPY ream_stream /tmp/source/ream_stream
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps /tmp/source \
    && pip check \
    && rm -r /tmp/source /tmp/constraints.txt

# Any user may write where nothing is mounted, so --user works without preparation.
RUN useradd --uid 10001 --no-create-home --home-dir /work ream \
    && mkdir -m 0777 /model /out /work
USER 10001
WORKDIR /work
VOLUME ["/model", "/out", "/work"]

# glibc keeps freed tensors under 32 MiB in its heap; with a fixed threshold, those of 1 MiB
# and more go back to the system at once, so that memory stays what the plan says.
# Caches of the hub go to /work, the only home that every user has.
ENV MALLOC_MMAP_THRESHOLD_=1048576 \
    PYTHONUNBUFFERED=1 \
    HOME=/work

# The first signal stops at the next safe point; give it time with: docker stop --time 600
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["ream-stream"]
CMD ["--help"]
