// Included at the end of every isa_*.cpp, inside namespace pycert::cpu::<isa>: the table of what was compiled there.
#if PYCERT_LANES > 2
template <typename T>
inline constexpr auto kProduct = product<T>;
template <typename T>
inline constexpr auto kConvolveRows = convolve_rows<T>;
template <typename T>
inline constexpr auto kDualProductMany = dual_product_many<T>;
#else
template <typename T>
inline constexpr void (*kProduct)(const ProductArgs<T>&) = nullptr;
template <typename T>
inline constexpr void (*kConvolveRows)(const ConvolutionArgs<T>&) = nullptr;
template <typename T>
inline constexpr void (*kDualProductMany)(const DualProductArgs<T>&) = nullptr;
#endif

template <typename T>
inline constexpr Kernels<T> kTable = {prepare<T>,
                                      enclose<T>,
                                      dual_product<T>,
                                      scale<T>,
                                      add<T>,
                                      linf_ball<T>,
                                      with_sign<T>,
                                      magnitudes<T>,
                                      squares<T>,
                                      charge<T>,
                                      kDualProductMany<T>,
                                      kProduct<T>,
                                      kConvolveRows<T>,
                                      interleave<T>,
                                      relax<T>,
                                      dot<T>,
                                      concretize<T>,
                                      relayout<T>,
                                      relax_backward<T>,
                                      concretize_backward<T>,
                                      relayout_backward<T>,
                                      ascend<T>,
                                      mask_scale<T>,
                                      mix_signs<T>,
                                      pack_bits,
                                      ball_box<T>,
                                      ball_box_backward<T>,
                                      ball_box_maximum<T>,
                                      krelu_hull<T>,
                                      nullptr,
                                      false,
                                      nullptr,
                                      nullptr,
                                      nullptr};

const Kernels<float>& float_kernels() { return kTable<float>; }
const Kernels<double>& double_kernels() { return kTable<double>; }
