//! Axes of tensors in letters, and values from one order of axes to another.
//!
//! `[d cpq]` is a matrix whose second axis runs over channels, then rows, then columns of a patch; `[m+3i d]` has rows
//! for the MLP and, after them, three times as many as all heads are wide. A letter is one size everywhere:
//!
//! | letter | size |
//! |---|---|
//! | `d` | model width |
//! | `m`, `e` | hidden width of the blocks' MLP, of the pooling head's |
//! | `h`, `k`, `i`, `j` | heads, width of a head, of all heads, of all heads of keys |
//! | `c`, `p`, `q` | channels, rows and columns of a patch |
//! | `y`, `x`, `n` | rows and columns of the position table, their product |
//! | `z`, `r`, `t` | cls tokens, registers, positions of prefix tokens |
//! | `o` | classes |

use std::collections::BTreeMap;

/// A product: `3i` is three times `i`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Term {
    pub factor: usize,
    pub letters: Vec<char>,
}

/// One axis: a sum of products, mostly of one.
pub(super) type Axis = Vec<Term>;

/// The axes of a tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Axes(pub Vec<Axis>);

impl Axes {
    /// Reads `m+3i d`; none where it is no such thing.
    pub fn parse(text: &str) -> Option<Self> {
        let term = |text: &str| {
            let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (factor, letters) = text.split_at(digits);
            let factor = if factor.is_empty() { 1 } else { factor.parse().ok()? };
            let letters: Vec<char> = letters.chars().collect();
            let known = letters.iter().all(|c| "dmehkijcpqyxnzrto".contains(*c));
            (known && !text.is_empty()).then_some(Term { factor, letters })
        };
        let axis = |text: &str| text.split('+').map(term).collect::<Option<Axis>>();
        text.split_whitespace().map(axis).collect::<Option<_>>().map(Self)
    }

    /// The axis that is a sum, and of how many terms.
    pub fn sum(&self) -> Option<(usize, usize)> {
        self.0.iter().position(|axis| axis.len() > 1).map(|at| (at, self.0[at].len()))
    }

    /// The part of this tensor that term `term` of the sum makes.
    pub fn part(&self, term: usize) -> Self {
        let axis = |axis: &Axis| if axis.len() > 1 { vec![axis[term].clone()] } else { axis.clone() };
        Self(self.0.iter().map(axis).collect())
    }

    /// The first axis alone: that of a bias beside a weight.
    pub fn first(&self) -> Self {
        Self(self.0.iter().take(1).cloned().collect())
    }

    /// The last axis alone: that of a bias beside a kernel `[in, out]`.
    pub fn last(&self) -> Self {
        Self(self.0.iter().last().into_iter().cloned().collect())
    }

    /// Sizes of the axes; none where a letter is unknown.
    pub fn shape(&self, sizes: &Sizes) -> Option<Vec<usize>> {
        self.0.iter().map(|axis| sizes.axis(axis)).collect()
    }

    /// Axes of more than one element, and their sizes in `shape`, if it has them: files differ in axes of one element.
    pub fn align<'a>(&'a self, shape: &[usize]) -> Option<Vec<(&'a Axis, usize)>> {
        let one = |axis: &Axis| axis.len() == 1 && axis[0].letters.is_empty() && axis[0].factor == 1;
        if self.0.len() == shape.len() {
            return Some(self.0.iter().zip(shape.iter().copied()).filter(|(axis, _)| !one(axis)).collect());
        }
        let axes: Vec<_> = self.0.iter().filter(|axis| !one(axis)).collect();
        let surplus = shape.len().checked_sub(axes.len())?;
        let (ones, rest) = shape.split_at(surplus);
        ones.iter().all(|size| *size == 1).then(|| axes.into_iter().zip(rest.iter().copied()).collect())
    }

    /// Every factor with its size, slowest first.
    fn atoms(&self, sizes: &Sizes) -> Option<Vec<(char, usize)>> {
        let mut atoms = Vec::new();
        for term in self.0.iter().flatten() {
            if term.factor != 1 {
                atoms.push((char::from_digit(term.factor as u32, 10)?, term.factor));
            }
            for &letter in &term.letters {
                atoms.push((letter, sizes.get(letter)?));
            }
        }
        Some(atoms)
    }
}

/// Sizes of the letters.
#[derive(Clone, Debug, Default)]
pub(super) struct Sizes(pub BTreeMap<char, usize>);

impl Sizes {
    /// Size of a letter, or what follows from others.
    pub fn get(&self, letter: char) -> Option<usize> {
        let letter = if letter == 'q' { 'p' } else { letter };
        let product = |a, b| Some(self.0.get(&a)? * self.0.get(&b)?);
        self.0.get(&letter).copied().or_else(|| match letter {
            'i' => product('h', 'k'),
            'n' => product('y', 'x'),
            'z' | 'r' | 't' => Some(0),
            _ => None,
        })
    }

    pub fn set(&mut self, letter: char, size: usize) {
        self.0.insert(letter, size);
    }

    pub fn term(&self, term: &Term) -> Option<usize> {
        term.letters.iter().try_fold(term.factor, |product, &letter| product.checked_mul(self.get(letter)?))
    }

    pub fn axis(&self, axis: &[Term]) -> Option<usize> {
        axis.iter().try_fold(0usize, |sum, term| sum.checked_add(self.term(term)?))
    }
}

/// `values` in the order of the axes `from`, in that of `to`; none where these are not the same axes, or of other sizes.
pub(super) fn reorder(values: Vec<f32>, from: &Axes, to: &Axes, sizes: &Sizes) -> Option<Vec<f32>> {
    let (from, to) = (from.atoms(sizes)?, to.atoms(sizes)?);
    if from.iter().map(|(_, size)| size).product::<usize>() != values.len() {
        return None;
    }
    let same = |a: &[(char, usize)], b: &[(char, usize)]| {
        a.iter().map(|(letter, _)| letter).eq(b.iter().map(|(letter, _)| letter))
    };
    if same(&from, &to) {
        return Some(values);
    }
    // What is one letter here and a product there keeps its order all the same.
    let stride_of = |wanted: char| {
        let at = from.iter().position(|(letter, _)| *letter == wanted)?;
        Some(from[at + 1..].iter().map(|(_, size)| size).product::<usize>())
    };
    let mut axes = Vec::with_capacity(to.len());
    for &(letter, size) in &to {
        axes.push((size, stride_of(letter)?));
    }
    if from.len() != to.len() {
        return None;
    }
    let mut out = Vec::with_capacity(values.len());
    let (&(inner, stride), outer) = axes.split_last()?;
    let mut index = vec![0; outer.len()];
    let mut start = 0;
    while out.len() < values.len() {
        out.extend((0..inner).map(|i| values[start + i * stride]));
        for (at, &(size, stride)) in outer.iter().enumerate().rev() {
            index[at] += 1;
            start += stride;
            if index[at] < size {
                break;
            }
            start -= size * stride;
            index[at] = 0;
        }
    }
    Some(out)
}

/// The elements of one term of the sum that axis `at` of `whole` is.
pub(super) fn cut(values: &[f32], whole: &Axes, at: usize, term: usize, sizes: &Sizes) -> Option<Vec<f32>> {
    let (outer, inner, total, first, len) = place(whole, at, term, sizes)?;
    let rows = (0..outer).map(|row| &values[(row * total + first) * inner..][..len * inner]);
    (values.len() == outer * total * inner).then(|| rows.flatten().copied().collect())
}

/// The opposite of [`cut`]: writes `part` into its place in `values`.
pub(super) fn paste(
    values: &mut [f32],
    part: &[f32],
    whole: &Axes,
    at: usize,
    term: usize,
    sizes: &Sizes,
) -> Option<()> {
    let (outer, inner, total, first, len) = place(whole, at, term, sizes)?;
    if values.len() != outer * total * inner || part.len() != outer * len * inner {
        return None;
    }
    for row in 0..outer {
        values[(row * total + first) * inner..][..len * inner]
            .copy_from_slice(&part[row * len * inner..][..len * inner]);
    }
    Some(())
}

/// Elements before and after axis `at`, its size, and where a term begins in it and how long it is.
fn place(whole: &Axes, at: usize, term: usize, sizes: &Sizes) -> Option<(usize, usize, usize, usize, usize)> {
    let shape = whole.shape(sizes)?;
    let terms: Vec<usize> = whole.0[at].iter().map(|term| sizes.term(term)).collect::<Option<_>>()?;
    let product = |axes: &[usize]| axes.iter().product::<usize>();
    let first = terms[..term].iter().sum();
    Some((product(&shape[..at]), product(&shape[at + 1..]), shape[at], first, terms[term]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(text: &str) -> Axes {
        Axes::parse(text).unwrap()
    }

    fn sizes() -> Sizes {
        Sizes([('d', 2), ('c', 3), ('p', 2), ('h', 2), ('k', 3), ('m', 5)].into())
    }

    #[test]
    fn shapes() {
        let sizes = sizes();
        assert_eq!(axes("d cpq").shape(&sizes), Some(vec![2, 12]));
        assert_eq!(axes("m+3i d").shape(&sizes), Some(vec![23, 2]));
        assert_eq!(axes("1 z+r d").shape(&sizes), Some(vec![1, 0, 2]));
        assert_eq!(axes("o d").shape(&sizes), None);
        assert!(Axes::parse("d w").is_none());
        let one = axes("1 n d");
        assert_eq!(one.align(&[7, 2]).unwrap().len(), 2);
        assert_eq!(axes("n d").align(&[1, 1, 7, 2]).unwrap()[0].1, 7);
        assert!(axes("n d").align(&[3, 7, 2]).is_none());
    }

    #[test]
    fn orders() {
        let sizes = sizes();
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        // (d, p, q, c) to (d, c, p, q).
        let to = reorder(values.clone(), &axes("d pqc"), &axes("d cpq"), &sizes).unwrap();
        assert_eq!(to[..6], [0.0, 3.0, 6.0, 9.0, 1.0, 4.0]);
        assert_eq!(to[12], 12.0);
        assert_eq!(reorder(to, &axes("d cpq"), &axes("d pqc"), &sizes).unwrap(), values);
        let kernel = reorder(values[..12].to_vec(), &axes("d h k"), &axes("hk d"), &sizes).unwrap();
        assert_eq!(kernel[..4], [0.0, 6.0, 1.0, 7.0]);
        assert!(reorder(values[..10].to_vec(), &axes("m d"), &axes("m h"), &sizes).is_none());
        assert!(reorder(values[..9].to_vec(), &axes("m d"), &axes("d m"), &sizes).is_none());
    }

    #[test]
    fn parts() {
        let sizes = sizes();
        let whole = axes("d i+m");
        let values: Vec<f32> = (0..22).map(|i| i as f32).collect();
        let parts = [0, 1].map(|term| cut(&values, &whole, 1, term, &sizes).unwrap());
        assert_eq!(parts[0][5..7], [5.0, 11.0]);
        assert_eq!(parts[1][..2], [6.0, 7.0]);
        let mut again = vec![0.0; 22];
        for (term, part) in parts.iter().enumerate() {
            paste(&mut again, part, &whole, 1, term, &sizes).unwrap();
        }
        assert_eq!(again, values);
    }
}
