//! Shapes of the GPU benchmarks: those of Vision Transformers, or a person's own.
//!
//! `TRENCADIS_BENCH_SHAPES` holds own shapes, or names a file of them: one a line or between semicolons,
//! `#` begins a comment. Only these are then measured.
//!
//! | line | meaning |
//! |---|---|
//! | `gemm M N K` | products with an M×N result over K, in all layouts and with all epilogues |
//! | `attention HEADS DIM LENGTHS` | images of so many tokens, such as `64*196,577`: 64 of 196 and one of 577 |
//! | `pool HEADS DIM LENGTHS` | the same for pooling |
//! | `rows ROWS WIDTH` | norms and residual connections of so many rows |
//! | `loss IMAGES CLASSES` | losses over so many logits |
//! | `contrastive PAIRS WIDTH` | contrastive losses of so many images and texts |
//! | `optim WIDTH DEPTH` | the optimiser over the parameters of a ViT |
//! | `step RECIPE TOKENS` | training steps of a recipe with so many tokens a batch |
//! | `embedding WIDTH LENGTHS` | the same for patches, positions and sums of rows of that width |
//! | `view HEIGHT WIDTH TARGET IMAGES` | so many photographs of that size, seen at TARGET pixels a side |

use std::path::Path;

/// Variable that holds own shapes.
pub const VARIABLE: &str = "TRENCADIS_BENCH_SHAPES";
/// Token rows of a batch that the kernels count up to.
const MOST_TOKENS: usize = 1 << 30;

/// Images packed into a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    /// What a table calls the batch, such as `64*196`.
    pub name: String,
    /// Tokens of each.
    pub lengths: Vec<usize>,
}

/// One shape of a family.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    Gemm { m: usize, n: usize, k: usize },
    Attention { heads: usize, head_dim: usize, images: Images },
    Pool { heads: usize, head_dim: usize, images: Images },
    Rows { rows: usize, width: usize },
    Loss { images: usize, classes: usize },
    Contrastive { pairs: usize, width: usize },
    Optim { width: usize, depth: usize },
    Embedding { width: usize, images: Images },
    Step { recipe: String, tokens: usize },
    View { size: (usize, usize), target: usize, images: usize },
}

impl Images {
    /// `count` images of `length` tokens.
    pub fn same(count: usize, length: usize) -> Self {
        Self { name: format!("{count}*{length}"), lengths: vec![length; count] }
    }

    /// NaViT's mix: image side uniform in `low..=high` pixels at patch 16, aspect ratio log-uniform in
    /// 1:2..2:1, as many images as fit `tokens`.
    pub fn mix(low: f32, high: f32, tokens: usize) -> Self {
        use trencadis::rng::{Purpose, Stream};
        let mut stream = Stream::new(3, 0, 0, Purpose::Resolution);
        let (mut lengths, mut used) = (Vec::new(), 0);
        loop {
            let side = (low + (high - low) * stream.uniform()) / 16.0;
            let aspect = (2.0 * stream.uniform() - 1.0).exp2().sqrt();
            let patches = ((side * aspect).round() * (side / aspect).round()) as usize;
            if used + patches > tokens {
                return Self { name: format!("U({low},{high})"), lengths };
            }
            lengths.push(patches);
            used += patches;
        }
    }

    /// Tokens of all images.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Where each begins, and where the last ends.
    pub fn cu_seqlens(&self) -> Vec<i32> {
        let mut starts = vec![0];
        for length in &self.lengths {
            starts.push(starts[starts.len() - 1] + *length as i32);
        }
        starts
    }

    /// Σ S² over the images.
    pub fn squares(&self) -> f64 {
        self.lengths.iter().map(|&s| (s * s) as f64).sum()
    }

    fn parse(text: &str) -> Option<Self> {
        let (mut lengths, mut tokens) = (Vec::new(), 0);
        for part in text.split(',') {
            let (count, length) = part.split_once('*').unwrap_or(("1", part));
            let (count, length): (usize, usize) = (count.parse().ok()?, length.parse().ok()?);
            tokens =
                count.checked_mul(length.max(1))?.checked_add(tokens).filter(|&sum| sum <= MOST_TOKENS)?;
            lengths.extend(std::iter::repeat_n(length, count));
        }
        (lengths.iter().sum::<usize>() > 0).then(|| Self { name: text.into(), lengths })
    }
}

/// Shapes out of the text of [`VARIABLE`] or of the file that it names.
///
/// # Errors
/// A line that is no shape; the sentence quotes it.
pub fn parse(text: &str) -> Result<Vec<Shape>, String> {
    let lines = text.split(['\n', ';']).map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(shape).collect()
}

fn shape(line: &str) -> Result<Shape, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |i: usize| words.get(i)?.parse::<usize>().ok().filter(|&n| n > 0);
    let parsed = match (words.as_slice(), number(1), number(2)) {
        (["gemm", _, _, _], Some(m), Some(n)) => number(3).map(|k| Shape::Gemm { m, n, k }),
        (["attention", _, _, images], Some(heads), Some(head_dim)) => {
            Images::parse(images).map(|images| Shape::Attention { heads, head_dim, images })
        }
        (["pool", _, _, images], Some(heads), Some(head_dim)) => {
            Images::parse(images).map(|images| Shape::Pool { heads, head_dim, images })
        }
        (&["rows", _, _], Some(rows), Some(width)) => {
            width.is_multiple_of(8).then_some(Shape::Rows { rows, width })
        }
        (["loss", _, _], Some(images), Some(classes)) => Some(Shape::Loss { images, classes }),
        (["contrastive", _, _], Some(pairs), Some(width)) => {
            width.is_multiple_of(8).then_some(Shape::Contrastive { pairs, width })
        }
        (["optim", _, _], Some(width), Some(depth)) => Some(Shape::Optim { width, depth }),
        (["embedding", _, images], Some(width), _) if width % 16 == 0 => {
            Images::parse(images).map(|images| Shape::Embedding { width, images })
        }
        (["view", ..], Some(height), Some(width)) if words.len() == 5 => {
            let sides = number(3).filter(|target| target.is_multiple_of(16)).zip(number(4));
            sides.map(|(target, images)| Shape::View { size: (height, width), target, images })
        }
        (&["step", recipe, _], _, Some(tokens)) => Some(Shape::Step { recipe: recipe.into(), tokens }),
        _ => None,
    };
    parsed.ok_or_else(|| {
        format!(
            "{VARIABLE}: \"{line}\" is no shape; write gemm M N K, attention HEADS DIM LENGTHS, pool HEADS DIM \
             LENGTHS or embedding WIDTH LENGTHS (a multiple of 16), with LENGTHS such as 64*196,577, rows ROWS \
             WIDTH or contrastive PAIRS WIDTH, with a width that is a multiple of 8, loss IMAGES CLASSES, optim WIDTH \
             DEPTH, view HEIGHT WIDTH TARGET IMAGES, with a target that is a multiple of 16, or step RECIPE TOKENS"
        )
    })
}

/// A person's own shapes; none where the variable is not set.
///
/// # Errors
/// As for [`parse`].
pub fn own() -> Result<Option<Vec<Shape>>, String> {
    let Ok(value) = std::env::var(VARIABLE) else { return Ok(None) };
    let text = match Path::new(&value).is_file() {
        true => std::fs::read_to_string(&value).map_err(|cause| format!("{VARIABLE}: {value}: {cause}"))?,
        false => value,
    };
    parse(&text).map(Some)
}
