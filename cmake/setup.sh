#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing to run the demo, the tests, the benchmarks or the checks of CI; does nothing when all is there.
# usage: cmake/setup.sh [demo|test|bench|ci]
set -eu

what=${1:-demo}

# name of the Debian package = a command on the path, a header, or a case of there()
build='g++=g++ cmake=cmake ninja-build=ninja libeigen3-dev=eigen3/Eigen/Core'
json='nlohmann-json3-dev=nlohmann/json.hpp'
report="$json zlib1g-dev=zlib.h libcli11-dev=CLI/CLI.hpp gnuplot-nox=gnuplot libboost-dev=boost/timer/progress_display.hpp"
case $what in
  demo) needs="$build $report" ;;
  test) needs="$build $report doctest-dev=doctest/doctest.h liblbfgspp-dev=LBFGS.h" ;;
  bench) needs="$build $json libbenchmark-dev=benchmark/benchmark.h" ;;
  ci) needs="$build $report doctest-dev=doctest/doctest.h liblbfgspp-dev=LBFGS.h libbenchmark-dev=benchmark/benchmark.h
             git=git pkgconf=pkg-config python3-venv=venv debootstrap=debootstrap/functions
             doxygen=doxygen libjs-mathjax=javascript/mathjax/MathJax.js
             libopenmpi-dev=mpi-headers openmpi-bin=mpirun
             libthrust-dev=thrust/version.h libopenblas-dev=cblas.h libtbb-dev=tbb/tbb.h
             libdlpack-dev=dlpack/dlpack.h
             g++-aarch64-linux-gnu=aarch64-linux-gnu-g++ qemu-user=qemu-aarch64
             clang=clang++ clang-format=clang-format clang-tidy=clang-tidy llvm=llvm-symbolizer libclang-rt-dev=asan-runtime" ;;
  *) echo "usage: cmake/setup.sh [demo|test|bench|ci]" >&2; exit 64 ;;
esac

there() {  # there PROBE
  case $1 in
    */* | *.h) local dir
         for dir in /usr/include /usr/include/*-linux-gnu /usr/share /usr/local/include /opt/homebrew/include /opt/local/include \
                    ${CPATH:+${CPATH//:/ }}; do
           if [ -e "$dir/$1" ]; then return 0; fi
         done
         return 1 ;;
    mpi-headers) echo '#include <mpi.h>' | mpicc -E - >/dev/null 2>&1 ;;  # openmpi-bin brings mpicc alone
    asan-runtime) [ -e "$(clang++ -print-file-name=libclang_rt.asan-$(uname -m).a 2>/dev/null)" ] ;;
    venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
    g++) command -v "${CXX:-g++}" >/dev/null ;;
    *) command -v "$1" >/dev/null ;;
  esac
}

missing=()
for need in $needs; do
  if ! there "${need#*=}"; then missing+=("${need%%=*}"); fi
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

if ! command -v apt-get >/dev/null; then
  echo "cmake/setup.sh: no apt-get here. Please install the equivalent of: ${missing[*]}" >&2
  exit 1
fi
root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "cmake/setup.sh: run as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  root=(sudo)
fi
echo "cmake/setup.sh: installing ${missing[*]}"
"${root[@]}" apt-get update -qq
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
