// SPDX-License-Identifier: Apache-2.0
#pragma once

// Lets every Eigen object that has storage be passed where activations are expected. Brings on_cpu, which
// measures them by default.

#include <type_traits>

#include <Eigen/Core>

#include <rflow/cpu.hpp>
#include <rflow/view.hpp>

namespace rflow {

namespace detail {

/// Eigen's 16-bit types have the same bits as ours.
template <class Scalar>
struct from_eigen {
  using type = Scalar;
};
template <>
struct from_eigen<Eigen::half> {
  using type = f16;
};
template <>
struct from_eigen<Eigen::bfloat16> {
  using type = bf16;
};

template <class X>
concept eigen_object = std::is_base_of_v<Eigen::EigenBase<X>, X>;

/// Maps, blocks and the like are gone at the end of a statement, what they look at is not. A Ref to
/// const may have a copy of its own.
template <class X>
struct eigen_lifetime {
  static constexpr bool borrowed = true;
};
template <class X>
requires std::is_base_of_v<Eigen::PlainObjectBase<X>, X>
struct eigen_lifetime<X> {
};
template <class X, int Options, class Stride>
struct eigen_lifetime<Eigen::Ref<X const, Options, Stride>> {};

template <class X>
inline constexpr bool eigen_has_storage = (Eigen::internal::traits<X>::Flags &
                                           Eigen::DirectAccessBit) != 0;

}  // namespace detail

/// Matrices, maps, refs and blocks of either storage order; rows are tokens.
template <detail::eigen_object X>
struct adapt<X> : detail::eigen_lifetime<X> {
  static_assert(detail::eigen_has_storage<X>,
                "rflow: this Eigen expression has no storage to look at. Evaluate it first: "
                "Eigen::MatrixXf x = expression;");
  using type = typename detail::from_eigen<typename X::Scalar>::type;  ///< ours for the scalar

  /// The elements where they are.
  static view<type> as_view(X const& x) {
    return {reinterpret_cast<type const*>(x.data()), x.rows(), x.cols(), x.rowStride(),
            x.colStride()};
  }
};

}  // namespace rflow
