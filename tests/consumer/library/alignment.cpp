// SPDX-License-Identifier: Apache-2.0
#include <rflow/cka.hpp>

double alignment(Eigen::MatrixXf const& x, Eigen::MatrixXf const& y) { return rflow::cka(x, y); }
