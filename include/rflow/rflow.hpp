// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every metric with the CPU backend: the one-include answer. Files, runtimes and other backends have
// headers of their own.

#include <rflow/cka.hpp>
#include <rflow/cosine.hpp>
#include <rflow/flow.hpp>
#include <rflow/init.hpp>
#include <rflow/jackknife.hpp>
#include <rflow/monitor.hpp>
#include <rflow/poincare.hpp>
#include <rflow/probe.hpp>
#include <rflow/theory.hpp>
#include <rflow/variance.hpp>
#include <rflow/view.hpp>
