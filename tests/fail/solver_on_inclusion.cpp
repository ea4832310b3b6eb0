// expect: after instantiation
// SPDX-License-Identifier: Apache-2.0
// Who includes all metrics and calls none does not wait for an eigenvalue solver: a class that was
// instantiated can no longer be specialised.
#include <rflow/rflow.hpp>

#ifndef RFLOW_POSITIVE_CONTROL
constexpr auto instantiated = sizeof(Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>);
#endif

template <>
class Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> {};
