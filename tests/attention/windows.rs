//! Attention in windows: the kernels over windows as segments, against plain attention among the patches of a window.

use trencadis::data::resolution::Grid;
use trencadis::kernels::attention::Windows;
use trencadis::recipe::QkNormKind;

use crate::case::{Case, Run, alike, config};
use crate::support::devices::devices;

/// Window and merge unit of Qwen2.5-VL.
const WINDOW: usize = 8;
const MERGE: usize = 2;

/// Every patch attends to the patches of its image whose rows and columns are in the same window as its own.
fn plain(case: &Case, grids: &[Grid]) -> Vec<f64> {
    let (rows, width, dim) = (case.used_rows(), case.width(), case.config.head_dim);
    let places: Vec<_> = (grids.iter().enumerate())
        .flat_map(|(image, grid)| (0..grid.patches()).map(move |i| (image, i / grid.cols, i % grid.cols)))
        .map(|(image, row, column)| (image, row / WINDOW, column / WINDOW))
        .collect();
    let part =
        |token: usize, part: usize, head: usize| &rows[(3 * token + part) * width + head * dim..][..dim];
    let mut out = Vec::new();
    for i in 0..places.len() {
        let near: Vec<usize> = (0..places.len()).filter(|&j| places[j] == places[i]).collect();
        for head in 0..case.config.heads {
            let dot =
                |j: usize| part(i, 0, head).iter().zip(part(j, 1, head)).map(|(q, k)| q * k).sum::<f64>();
            let shares: Vec<f64> = near.iter().map(|&j| (case.config.scale * dot(j)).exp()).collect();
            let total: f64 = shares.iter().sum();
            out.extend((0..dim).map(|column| {
                let values = near.iter().map(|&j| part(j, 2, head)[column]);
                values.zip(&shares).map(|(v, share)| v * share).sum::<f64>() / total
            }));
        }
    }
    out
}

#[test]
fn windows_are_segments() {
    let grids = [(10, 18), (4, 6), (8, 8), (2, 20)].map(|(rows, cols)| Grid { rows, cols });
    let windows = Windows::new(&grids, WINDOW, MERGE).unwrap();
    assert_eq!(windows.longest(), WINDOW * WINDOW);
    let lengths: Vec<usize> =
        windows.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect();
    // Rows of the images as they are, patches row by row, and in the order of the windows.
    let images = Case::new(config(QkNormKind::None, 2, 64), &grids.map(Grid::patches), 0);
    let mut ordered = Case::new(images.config, &lengths, 0);
    let row = |i: usize| &images.qkv[i * images.stride()..][..images.stride()];
    ordered.qkv = windows.order.iter().flat_map(|&i| row(i)).copied().collect();
    let want = plain(&images, &grids);
    for device in devices() {
        let answer = ordered.check(&device, Run { longest: Some(windows.longest()), ..Run::default() });
        let place = |i: usize| &answer.out[windows.inverse[i] * images.width()..][..images.width()];
        let got: Vec<f64> = (0..images.tokens).flat_map(place).map(|x| x.to_f64()).collect();
        alike("out of windows", &got, &want, 2e-5, 1e-2);
    }
}
