// entry.h: what a loader calls in a kernel's shared library. Included after the kernel's source.
#ifndef CUPAGED_HOST_ENTRY_H
#define CUPAGED_HOST_ENTRY_H

#include <type_traits>
#include <utility>

namespace host {

// What the loader checks an argument against.
struct Parameter {
  char kind;         // 'p' pointer, 'c' pointer to const, 'i' integer, 'f' floating point, 's' struct by value
  unsigned size;     // bytes of the parameter
  unsigned pointee;  // bytes of what a pointer points to; 0 for void
};

template <typename T>
struct PointeeSize {
  static constexpr unsigned value = 0;
};
template <typename T>
struct PointeeSize<T*> {
  static constexpr unsigned value = sizeof(std::conditional_t<std::is_void_v<T>, char, T>) * !std::is_void_v<T>;
};

template <typename T>
constexpr Parameter parameter() {
  const char kind = std::is_pointer_v<T> ? (std::is_const_v<std::remove_pointer_t<T>> ? 'c' : 'p')
                    : std::is_integral_v<T> || std::is_enum_v<T> ? 'i'
                    : std::is_floating_point_v<T>                ? 'f'
                                                                 : 's';
  return {kind, sizeof(T), PointeeSize<T>::value};
}

template <typename... P>
struct Parameters {
  static constexpr int count = sizeof...(P);
  static constexpr Parameter table[sizeof...(P) + 1] = {parameter<P>()..., {}};
};

template <typename... P>
Parameters<P...> parameters_of(void (*)(P...));

template <typename... P, std::size_t... I>
__attribute__((no_sanitize("thread", "undefined"))) inline void call(void (*kernel)(P...), void* const* args,
                                                                      std::index_sequence<I...>) {
  kernel(*static_cast<P*>(args[I])...);
}

template <typename... P>
__attribute__((no_sanitize("thread", "undefined"))) inline void call(void (*kernel)(P...), void* const* args) {
  call(kernel, args, std::index_sequence_for<P...>());
}

}  // namespace host

extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];

#define CUPAGED_EXPORT extern "C" __attribute__((visibility("default"), no_sanitize("thread", "undefined")))

// kernel: one instantiation, as a name expression.
#define CUPAGED_HOST_KERNEL(...)                                                        \
  static constexpr auto cupaged_kernel = &__VA_ARGS__;                                  \
  using cupaged_parameters_t = decltype(host::parameters_of(cupaged_kernel));           \
  CUPAGED_EXPORT int cupaged_num_parameters() { return cupaged_parameters_t::count; }   \
  CUPAGED_EXPORT const host::Parameter* cupaged_parameters() { return cupaged_parameters_t::table; } \
  CUPAGED_EXPORT void* cupaged_static_shared_begin() { return __bss_start; }            \
  CUPAGED_EXPORT void* cupaged_static_shared_end() { return _end; }                     \
  CUPAGED_EXPORT void cupaged_call(void* const* args) { host::call(cupaged_kernel, args); }

#endif  // CUPAGED_HOST_ENTRY_H
