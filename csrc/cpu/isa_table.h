// Included at the end of every isa_*.cpp, inside namespace pycert::cpu::<isa>: the table of what was compiled there.
template <typename T>
inline constexpr Kernels<T> kTable = {prepare<T>,
                                      enclose<T>,
                                      dual_product<T>,
                                      scale<T>,
                                      add<T>,
                                      magnitudes<T>,
                                      charge<T>,
                                      relax<T>,
                                      dot<T>,
                                      concretize<T>,
                                      relayout<T>,
                                      relax_backward<T>,
                                      concretize_backward<T>,
                                      relayout_backward<T>};

const Kernels<float>& float_kernels() { return kTable<float>; }
const Kernels<double>& double_kernels() { return kTable<double>; }
