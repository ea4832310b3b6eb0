// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the file readers share: dtype and tensor (a file's types are known at run time, a view's at
// compile time), mapped_file to read and atomic_writer to write. Most programs want npy.hpp or
// safetensors.hpp instead. POSIX only: it stands on mmap, fsync and rename.

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include <rflow/view.hpp>

namespace rflow {

static_assert(std::endian::native == std::endian::little,
              "rflow: the file formats are little endian and are viewed in place");

// ---- element types ------------------------------------------------------------------------------

/// What a file says its elements are. Only f16, bf16, f32 and f64 become views; the 8-bit floats with
/// a sign become views of f32 (widen.hpp); boolean and the integers can be read as labels; the
/// others have names, so that errors can tell what was found.
enum class dtype : std::uint8_t {
  boolean,
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  u64,
  i64,
  f16,
  bf16,
  f32,
  f64,
  c64,
  c128,
  raw8,     ///< a byte without a meaning: NumPy's |V1
  raw16,    ///< two bytes without a meaning: NumPy's |V2
  f8_e4m3,  ///< the "fn" variant: no infinity
  f8_e5m2,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  f6_e2m3,
  f6_e3m2,
  f4,
};

namespace detail {

struct dtype_facts {
  std::string_view name;
  unsigned bits;
};
inline constexpr dtype_facts dtype_table[] = {
    {"bool", 8},        {"u8", 8},          {"i8", 8},      {"u16", 16},    {"i16", 16},
    {"u32", 32},        {"i32", 32},        {"u64", 64},    {"i64", 64},    {"f16", 16},
    {"bf16", 16},       {"f32", 32},        {"f64", 64},    {"c64", 64},    {"c128", 128},
    {"raw8", 8},        {"raw16", 16},      {"f8_e4m3", 8}, {"f8_e5m2", 8}, {"f8_e8m0", 8},
    {"f8_e4m3fnuz", 8}, {"f8_e5m2fnuz", 8}, {"f6_e2m3", 6}, {"f6_e3m2", 6}, {"f4", 4},
};

}  // namespace detail

/// The type's name, for messages.
constexpr std::string_view to_string(dtype type) {
  return detail::dtype_table[static_cast<std::size_t>(type)].name;
}

/// Bits of one element: 4 to 128.
constexpr unsigned bits(dtype type) {
  return detail::dtype_table[static_cast<std::size_t>(type)].bits;
}

/// Whether views of this type exist.
constexpr bool is_viewable(dtype type) {
  return type == dtype::f16 || type == dtype::bf16 || type == dtype::f32 || type == dtype::f64;
}

/// A type that has a dtype: the scalars of views, bool and the integers.
template <class T>
concept storable = scalar<T> ||(std::integral<T> && sizeof(T) <= 8);

/// The dtype of a C++ type.
template <storable T>
inline constexpr dtype dtype_of = [] {
  if constexpr (std::same_as<T, rflow::f16>)
    return dtype::f16;
  else if constexpr (std::same_as<T, rflow::bf16>)
    return dtype::bf16;
  else if constexpr (std::same_as<T, float>)
    return dtype::f32;
  else if constexpr (std::same_as<T, double>)
    return dtype::f64;
  else if constexpr (std::same_as<T, bool>)
    return dtype::boolean;
  else if constexpr (sizeof(T) == 1)
    return std::is_signed_v<T> ? dtype::i8 : dtype::u8;
  else if constexpr (sizeof(T) == 2)
    return std::is_signed_v<T> ? dtype::i16 : dtype::u16;
  else if constexpr (sizeof(T) == 4)
    return std::is_signed_v<T> ? dtype::i32 : dtype::u32;
  else
    return std::is_signed_v<T> ? dtype::i64 : dtype::u64;
}();

namespace detail {

/// Names come from files: short, and without the control characters that garble a terminal.
inline std::string printable(std::string_view name) {
  std::string text(name.substr(0, 80));
  for (char& c : text)
    if ((c >= 0 && c < ' ') || c == '\x7f') c = '?';
  return name.size() > 80 ? text + "..." : text;
}

/// What to do about a type that is none of activations; for messages.
inline std::string cure_of(dtype type) {
  switch (type) {
    case dtype::raw16:
    case dtype::u16:
    case dtype::i16:
      return " (if these are the bits of halves, open the .npy with reinterpret::as_f16 or "
             "reinterpret::as_bf16)";
    case dtype::raw8:
      return " (if these are the bits of 8-bit floats, open the .npy with reinterpret::as_f8_e4m3 "
             "or reinterpret::as_f8_e5m2)";
    case dtype::u8:
    case dtype::i8:
      return " (integers have no scale: store activations as float; if these are the bits of 8-bit "
             "floats, open the .npy with reinterpret::as_f8_e4m3 or reinterpret::as_f8_e5m2)";
    case dtype::u32:
    case dtype::i32:
    case dtype::u64:
    case dtype::i64: return " (integers have no scale: store activations as float)";
    default: return "";
  }
}

/// "[3, 4]"
inline std::string shape_text(std::vector<std::ptrdiff_t> const& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

/// What addresses of elements must be multiples of.
constexpr std::size_t alignment(dtype type) {
  return std::clamp<std::size_t>(bits(type) / 8, 1, alignof(double));
}

/// More axes than NumPy can hold; it bounds what a hostile shape can cost.
inline constexpr std::size_t most_axes = 64;

/// a * b in result, or false on overflow. Neither is negative.
constexpr bool multiply(std::ptrdiff_t a, std::ptrdiff_t b, std::ptrdiff_t& result) {
  if (b != 0 && a > PTRDIFF_MAX / b) return false;
  result = a * b;
  return true;
}

/// Elements of an array, and the bits they take. ok is false if they do not fit std::ptrdiff_t;
/// axes of length 0 do not hide an overflow of the others, because strides are formed from them.
struct extent {
  bool ok = true;
  std::ptrdiff_t elements = 1, bits = 0;
};
inline extent extent_of(std::vector<std::ptrdiff_t> const& shape, unsigned bits_each) {
  extent out;
  std::ptrdiff_t widest = 1;
  for (std::ptrdiff_t const n : shape) {
    if (n < 0 || !multiply(widest, std::max<std::ptrdiff_t>(n, 1), widest)) return {false, 0, 0};
    out.elements *= n;
  }
  if (!multiply(widest, static_cast<std::ptrdiff_t>(bits_each), widest)) return {false, 0, 0};
  out.bits = out.elements * static_cast<std::ptrdiff_t>(bits_each);
  return out;
}

/// Strides in elements of a dense array whose last axis (or first) is the fastest.
inline std::vector<std::ptrdiff_t> dense_strides(std::vector<std::ptrdiff_t> const& shape,
                                                 bool first_fastest = false) {
  std::vector<std::ptrdiff_t> strides(shape.size());
  std::ptrdiff_t step = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    std::size_t const axis = first_fastest ? i : shape.size() - 1 - i;
    strides[axis] = step;
    step *= std::max<std::ptrdiff_t>(shape[axis], 1);
  }
  return strides;
}

}  // namespace detail

// ---- tensors ------------------------------------------------------------------------------------

/// An array whose type and rank are known at run time. Looks at the memory of the file (or other
/// object) it came from and is valid as long as that is; copying it copies no elements.
struct tensor {
  std::string name;                     ///< as in the file
  dtype type = dtype::f32;              ///< what elements are
  std::vector<std::ptrdiff_t> shape;    ///< slowest axis first
  std::vector<std::ptrdiff_t> strides;  ///< in elements
  std::byte const* data = nullptr;      ///< aligned for its type

  /// Number of axes.
  std::ptrdiff_t rank() const { return static_cast<std::ptrdiff_t>(shape.size()); }

  /// Number of elements; 1 for a scalar.
  std::ptrdiff_t size() const {
    std::ptrdiff_t n = 1;
    for (std::ptrdiff_t const axis : shape) n *= axis;
    return n;
  }

  /// The elements, whatever the rank: to be used with `shape` and `strides`.
  /// @throws std::invalid_argument if the tensor holds another type, or data is not aligned for T
  template <storable T>
  T const* elements() const {
    require(type == dtype_of<T>, "rflow::tensor::elements",
            std::string(to_string(dtype_of<T>)) + " expected");
    return aligned<T>("rflow::tensor::elements");
  }

  /// The n × d view of a tensor of rank 2, tokens in rows. Nothing is converted or copied.
  /// @throws std::invalid_argument if the tensor holds another type or has another rank; the text
  ///         states what was expected and what is there
  template <scalar T>
  view<T> as() const {
    require(type == dtype_of<T> && rank() == 2, "rflow::tensor::as",
            std::string(to_string(dtype_of<T>)) + " of rank 2 expected");
    return {aligned<T>("rflow::tensor::as"), shape[0], shape[1], strides[0], strides[1]};
  }

  /// The layers of a tensor of rank 3, axes sites × tokens × hidden. For another order of axes
  /// build a layer_stack from elements(), shape and strides.
  /// @throws std::invalid_argument as as(), and if an axis is empty
  template <scalar T>
  layer_stack<T> as_stack() const {
    require(type == dtype_of<T> && rank() == 3, "rflow::tensor::as_stack",
            std::string(to_string(dtype_of<T>)) + " of rank 3 expected");
    if (size() == 0)  // the number of sites of an empty array is not bounded by its data
      detail::reject("rflow::tensor::as_stack", "an empty axis in " + description());
    return layer_stack<T>(aligned<T>("rflow::tensor::as_stack"),
                          stack_shape{shape[0], shape[1], shape[2]},
                          stack_strides{strides[0], strides[1], strides[2]});
  }

  /// Copies the values of a tensor of booleans or integers, row-major: class labels, token ids.
  /// @throws std::invalid_argument if the type is another or a value does not fit
  std::vector<std::int64_t> integers() const {
    switch (type) {
      case dtype::boolean: return widened<std::uint8_t>();  // a byte other than 0 or 1 is no bool
      case dtype::u8: return widened<std::uint8_t>();
      case dtype::i8: return widened<std::int8_t>();
      case dtype::u16: return widened<std::uint16_t>();
      case dtype::i16: return widened<std::int16_t>();
      case dtype::u32: return widened<std::uint32_t>();
      case dtype::i32: return widened<std::int32_t>();
      case dtype::u64: return widened<std::uint64_t>();
      case dtype::i64: return widened<std::int64_t>();
      default: break;
    }
    require(false, "rflow::tensor::integers", "booleans or integers expected");
    return {};
  }

  /// "'block.1', f32 [128, 576]", for messages.
  std::string description() const {
    return std::string("'") + detail::printable(name) + "', " + std::string(to_string(type)) + " " +
           detail::shape_text(shape);
  }

 private:
  void require(bool holds, char const* where, std::string const& expected) const {
    if (holds) return;
    detail::reject(where, expected + ", found " + description() + detail::cure_of(type));
  }

  template <class T>
  T const* aligned(char const* where) const {
    if (reinterpret_cast<std::uintptr_t>(data) % alignof(T) != 0)
      detail::reject(where, "data not aligned to " + std::to_string(alignof(T)) + " bytes in " +
                                description());
    return reinterpret_cast<T const*>(data);
  }

  template <class T>
  std::vector<std::int64_t> widened() const;
};

namespace detail {

template <class Container>
concept contiguous_values =
    storable<std::remove_cvref_t<decltype(*std::declval<Container const&>().data())>>;
// Of what a forwarding reference deduces: lvalues deduce a reference.
template <class X>
concept temporary = !std::is_lvalue_reference_v<X>;
template <class X>
concept temporary_activations = temporary<X> && activations<X> && !requires {
  adapt<std::remove_cvref_t<X>>::borrowed;
};

}  // namespace detail

/// Describes n × d activations as a tensor, to be written.
/// @throws std::invalid_argument if x has a negative extent
template <activations X>
tensor as_tensor(std::string name, X const& x) {
  auto const v = rflow::as_view(x);
  static_assert(std::same_as<memory_of<X>, host_memory>, "rflow: files are written from the host");
  if (v.rows < 0 || v.cols < 0) detail::reject("rflow::as_tensor", "negative extent");
  return {std::move(name),
          dtype_of<scalar_of<X>>,
          {v.rows, v.cols},
          {v.row_stride, v.col_stride},
          reinterpret_cast<std::byte const*>(v.data)};
}

/// Describes contiguous row-major values (std::vector, std::span) of any rank as a tensor.
/// @throws std::invalid_argument if the values do not make that shape
template <detail::contiguous_values Container>
tensor as_tensor(std::string name, Container const& values, std::vector<std::ptrdiff_t> shape) {
  using element = std::remove_cvref_t<decltype(*values.data())>;
  auto const extent = detail::extent_of(shape, bits(dtype_of<element>));
  if (!extent.ok || static_cast<std::size_t>(extent.elements) != values.size())
    detail::reject("rflow::as_tensor", std::to_string(values.size()) + " values do not make " +
                                           detail::shape_text(shape));
  auto strides = detail::dense_strides(shape);
  return {std::move(name), dtype_of<element>, std::move(shape), std::move(strides),
          reinterpret_cast<std::byte const*>(values.data())};
}

/// Values that die at the end of the statement: keep them in a variable first.
template <detail::temporary_activations X>
tensor as_tensor(std::string name, X&& x) = delete;
template <detail::temporary Container>
tensor as_tensor(std::string name, Container&& values, std::vector<std::ptrdiff_t> shape) = delete;
template <class T>
tensor as_tensor(std::string name, std::span<T>&& values, std::vector<std::ptrdiff_t> shape) {
  return as_tensor(std::move(name), std::as_const(values), std::move(shape));
}

/// Calls f with the view of a tensor of rank 2: view<f16>, view<bf16>, view<float> or
/// view<double>. All four calls must return the same type.
/// @throws std::invalid_argument if the tensor has another type or rank
template <class Function>
auto visit(tensor const& x, Function&& f) {
  switch (x.type) {
    case dtype::f16: return f(x.as<f16>());
    case dtype::bf16: return f(x.as<bf16>());
    case dtype::f64: return f(x.as<double>());
    default: return f(x.as<float>());
  }
}

namespace detail {

/// Calls f(address of a run of elements, elements in the run) over x in row-major order; runs along
/// the last axis if that is dense, single elements otherwise.
template <class Function>
void for_each_run(tensor const& x, Function&& f) {
  if (x.size() == 0) return;
  auto const item = static_cast<std::ptrdiff_t>(bits(x.type) / 8);
  if (x.strides == dense_strides(x.shape)) return f(x.data, x.size());
  std::size_t outer = x.shape.size();
  std::ptrdiff_t run = 1;
  if (x.strides.back() == 1) run = x.shape[--outer];
  std::vector<std::ptrdiff_t> index(outer, 0);
  std::ptrdiff_t offset = 0;
  for (;;) {
    f(x.data + offset * item, run);
    std::size_t axis = outer;
    for (; axis > 0; --axis) {
      offset += x.strides[axis - 1];
      if (++index[axis - 1] < x.shape[axis - 1]) break;
      offset -= x.strides[axis - 1] * x.shape[axis - 1];
      index[axis - 1] = 0;
    }
    if (axis == 0) return;
  }
}

}  // namespace detail

template <class T>
std::vector<std::int64_t> tensor::widened() const {
  std::vector<std::int64_t> out;
  out.reserve(static_cast<std::size_t>(size()));
  detail::for_each_run(*this, [&](std::byte const* run, std::ptrdiff_t n) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      T value;
      std::memcpy(&value, run + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
      if (!std::in_range<std::int64_t>(value) || (type == dtype::boolean && value > T{1}))
        detail::reject("rflow::tensor::integers", "element " + std::to_string(out.size()) + " is " +
                                                      std::to_string(value) + ", out of range in " +
                                                      description());
      out.push_back(static_cast<std::int64_t>(value));
    }
  });
  return out;
}

// ---- reading ------------------------------------------------------------------------------------

namespace detail {

[[noreturn]] inline void fail(int error, std::string const& what) {
  throw std::system_error(error, std::generic_category(), what);
}

class descriptor {
 public:
  explicit descriptor(int fd) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&&) = delete;
  ~descriptor() { close(); }
  int get() const { return fd_; }
  /// 0, or the error of close(2).
  int close() { return fd_ >= 0 && ::close(std::exchange(fd_, -1)) != 0 ? errno : 0; }

 private:
  int fd_;
};

}  // namespace detail

/// The bytes of a regular file, mapped read-only for as long as the object lives.
///
/// A mapping follows the file: if another process shortens it, reading past the new end kills the
/// process (SIGBUS). Programs that replace files by renaming, as atomic_writer does, are safe.
class mapped_file {
 public:
  /// Maps a file.
  /// @throws std::system_error with the path if it cannot be opened or is not a regular file
  explicit mapped_file(std::filesystem::path const& path) : path_(path.string()) {
    // A pipe without a writer would block in open().
    detail::descriptor const fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) detail::fail(errno, path_);
    struct stat facts {};
    if (::fstat(fd.get(), &facts) != 0) detail::fail(errno, path_);
    if (S_ISDIR(facts.st_mode)) detail::fail(EISDIR, path_);
    if (!S_ISREG(facts.st_mode)) detail::fail(EINVAL, path_ + ": not a regular file");
    size_ = static_cast<std::size_t>(facts.st_size);
    if (size_ == 0) return;  // there is no mapping of length 0
    void* const address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
    if (address == MAP_FAILED) detail::fail(errno, path_);
    data_ = static_cast<std::byte const*>(address);
    mapped_ = true;
  }

  /// Bytes that somebody else keeps alive, read as if they were a file of that name.
  static mapped_file borrow(std::span<std::byte const> bytes, std::string name) {
    mapped_file out;
    out.path_ = std::move(name);
    out.data_ = bytes.data();
    out.size_ = bytes.size();
    return out;
  }

  /// Moves the mapping; views of it stay valid.
  mapped_file(mapped_file&& other) noexcept
      : path_(std::move(other.path_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        mapped_(std::exchange(other.mapped_, false)),
        copies_(std::move(other.copies_)) {}
  /// The same.
  mapped_file& operator=(mapped_file other) noexcept {
    std::swap(path_, other.path_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    std::swap(copies_, other.copies_);
    return *this;
  }
  ~mapped_file() {
    if (mapped_) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  /// The whole file.
  std::span<std::byte const> bytes() const { return {data_, size_}; }
  /// Its name, for messages.
  std::string const& path() const { return path_; }

  /// The bytes [offset, offset + length) at an address that is a multiple of alignment: in place
  /// where the file lays them so, else a copy that is made on first use and lives as long as the
  /// file. May be called from several threads.
  /// @pre the range is inside the file; alignment is at most that of std::max_align_t
  std::byte const* aligned(std::size_t offset, std::size_t length, std::size_t alignment) const {
    if (reinterpret_cast<std::uintptr_t>(data_ + offset) % alignment == 0) return data_ + offset;
    std::lock_guard const lock(copies_->lock);
    auto& copy = copies_->made[{offset, length}];
    if (copy == nullptr) {
      copy = std::unique_ptr<std::byte[]>(new std::byte[std::max<std::size_t>(length, 1)]);
      std::memcpy(copy.get(), data_ + offset, length);
    }
    return copy.get();
  }

 private:
  struct copies {
    std::mutex lock;
    std::map<std::pair<std::size_t, std::size_t>, std::unique_ptr<std::byte[]>> made;
  };

  mapped_file() = default;

  std::string path_;
  std::byte const* data_ = nullptr;
  std::size_t size_ = 0;
  bool mapped_ = false;
  std::unique_ptr<copies> copies_ = std::make_unique<copies>();
};

// ---- writing ------------------------------------------------------------------------------------

/// Writes a file that is either complete or not there: bytes go to a temporary name in the same
/// directory, and commit() flushes them to the disk and renames. Without commit() the temporary is
/// removed and a file that was there before stays as it was. A symbolic link is replaced, not
/// followed. What a killed process leaves behind is PATH.tmp-NUMBER-NUMBER; the temporary of a living
/// one is locked (flock), so that others can tell the two apart.
class atomic_writer {
 public:
  /// @throws std::system_error with the path if no file can be made there, or if the path is
  ///         something else than a regular file
  explicit atomic_writer(std::filesystem::path const& path) : path_(path.string()) {
    struct stat facts {};
    if (::stat(path_.c_str(), &facts) == 0 && !S_ISREG(facts.st_mode))
      detail::fail(S_ISDIR(facts.st_mode) ? EISDIR : EINVAL, path_ + ": not a regular file");
    static std::atomic<unsigned> count{0};
    int fd = -1;
    do {
      temporary_ = path_ + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(++count);
      fd = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd < 0 && errno == EEXIST);
    if (fd < 0) detail::fail(errno, path_);
    static_cast<void>(::flock(fd, LOCK_EX | LOCK_NB));  // not every file system can
    file_ = std::make_unique<detail::descriptor>(fd);
  }

  atomic_writer(atomic_writer const&) = delete;
  atomic_writer& operator=(atomic_writer const&) = delete;
  ~atomic_writer() {
    if (file_ != nullptr) ::unlink(temporary_.c_str());
  }

  /// Appends bytes.
  /// @throws std::system_error with the path, for example when the disk is full
  void write(std::span<std::byte const> bytes) {
    if (file_ == nullptr) detail::fail(EBADF, path_ + ": written after commit");
    while (!bytes.empty()) {
      // Some systems refuse more than 2 GiB at once.
      ::ssize_t const n =
          ::write(file_->get(), bytes.data(), std::min<std::size_t>(bytes.size(), 1u << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) detail::fail(errno, path_);
      bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
  }
  /// The same for text.
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

  /// Flushes to the disk and gives the file its name. Nothing can be written after it.
  /// @throws std::system_error with the path; the temporary is then removed on destruction
  void commit() {
    if (file_ == nullptr) detail::fail(EBADF, path_ + ": committed twice");
    if (::fsync(file_->get()) != 0) detail::fail(errno, path_);
    if (int const error = file_->close(); error != 0) detail::fail(error, path_);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) detail::fail(errno, path_);
    file_.reset();
  }

 private:
  std::string path_, temporary_;
  std::unique_ptr<detail::descriptor> file_;
};

namespace detail {

/// Writes the elements row-major, gathering single elements into blocks.
inline void write_elements(atomic_writer& out, tensor const& x) {
  auto const item = static_cast<std::size_t>(bits(x.type) / 8);
  if (bits(x.type) % 8 != 0) {  // packed, so dense
    auto const packed = extent_of(x.shape, bits(x.type)).bits / 8;
    return out.write(std::span(x.data, static_cast<std::size_t>(packed)));
  }
  std::vector<std::byte> block;
  for_each_run(x, [&](std::byte const* run, std::ptrdiff_t n) {
    std::span const bytes(run, static_cast<std::size_t>(n) * item);
    if (bytes.size() < 4096) {
      block.insert(block.end(), bytes.begin(), bytes.end());
      if (block.size() < (1u << 20)) return;
    }
    out.write(block);
    block.clear();
    if (bytes.size() >= 4096) out.write(bytes);
  });
  out.write(block);
}

/// Throws std::invalid_argument unless x is something that can be written.
inline void require_writable(char const* where, tensor const& x) {
  if (x.strides.size() != x.shape.size())
    reject(where, std::to_string(x.shape.size()) + " extents and " +
                      std::to_string(x.strides.size()) + " strides in " + x.description());
  if (x.shape.size() > most_axes) reject(where, "more than 64 axes in " + x.description());
  if (!extent_of(x.shape, bits(x.type)).ok) reject(where, "impossible shape in " + x.description());
  if (x.data == nullptr && x.size() != 0) reject(where, "no data in " + x.description());
  if (bits(x.type) % 8 != 0 &&
      (x.strides != dense_strides(x.shape) || extent_of(x.shape, bits(x.type)).bits % 8 != 0))
    reject(where, "packed elements that do not fill whole bytes in order in " + x.description());
}

}  // namespace detail
}  // namespace rflow
