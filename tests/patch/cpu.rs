//! Normalised patches and prefix tokens of the CPU device.

use trencadis::cpu::{patch, real::Real};
use trencadis::data::batch::{PREFIX, Patches};

use crate::support::numbers::{close, random};

/// Every third row is a prefix token; the batch has two rows more than the output asks for.
fn normalise<R: Real>(rows: usize, channels: usize, plane: usize, mean: &[f32], std: &[f32]) {
    let width = channels * plane;
    let positions: Vec<[u16; 2]> =
        (0..rows + 2).map(|t| if t % 3 == 0 { PREFIX } else { [t as u16, 7] }).collect();
    let pixels: Vec<u8> = (0..(rows + 2) * width).map(|i| (i * 37 % 256) as u8).collect();
    let values: Vec<f32> = random((rows + 2) * width, 1);
    let entry = |values: &[f32], c: usize| f64::from(values[if values.len() == 1 { 0 } else { c }]);
    let expect = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
        (0..rows * width).map(|i| if (i / width).is_multiple_of(3) { 0.0 } else { value(i) }).collect()
    };

    let mut out = vec![R::of(f64::NAN); rows * width];
    patch::normalise(&mut out, &Patches::U8(pixels.clone()), &positions, mean, std, width);
    let want = expect(&|i| {
        let c = i % width / plane;
        (f64::from(pixels[i]) / 255.0 - entry(mean, c)) / entry(std, c)
    });
    close(&out, &want, if size_of::<R>() == 4 { 1e-6 } else { 1e-12 });

    out.fill(R::of(f64::NAN));
    patch::normalise(&mut out, &Patches::F32(values.clone()), &positions, mean, std, width);
    close(&out, &expect(&|i| f64::from(values[i])), 0.0);
}

#[test]
fn patches_are_normalised_by_channel() {
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    for (rows, plane) in [(0, 16), (1, 1), (3, 63), (65, 16), (67, 256)] {
        normalise::<f32>(rows, 3, plane, &mean, &std);
        normalise::<f64>(rows, 3, plane, &mean, &std);
        normalise::<f32>(rows, 3, plane, &[0.5], &[0.25]);
        normalise::<f32>(rows, 3, plane, &mean, &[0.25]);
        normalise::<f64>(rows, 1, plane, &[0.5], &[0.25]);
    }
}

#[test]
fn prefix_tokens_are_written_and_their_gradient_is_gathered() {
    // Images of 5, 0 (unused slot), 2 and 4 tokens, two of which are prefix tokens.
    let (cu_seqlens, prefix, width) = ([0, 5, 5, 7, 11], 2, 3);
    let starts = [0, 5, 7];
    let tokens: Vec<f64> = random(prefix * width, 1);
    let before: Vec<f64> = random(11 * width, 2);
    let prefix_row =
        |row: usize| starts.iter().find_map(|&s| (s..s + prefix).contains(&row).then(|| row - s));

    let mut x = before.clone();
    patch::write_prefix(&mut x, &tokens, &cu_seqlens, prefix, width);
    for (i, &x) in x.iter().enumerate() {
        let want = prefix_row(i / width).map_or(before[i], |row| tokens[row * width + i % width]);
        assert_eq!(x, want, "element {i}");
    }

    let mut dx = before.clone();
    let mut dtokens = tokens.clone();
    patch::write_prefix_grad(&mut dx, Some(&mut dtokens), &cu_seqlens, prefix, width);
    let want: Vec<f64> = (0..prefix * width)
        .map(|i| tokens[i] + starts.iter().map(|s| before[s * width + i]).sum::<f64>())
        .collect();
    close(&dtokens, &want, 1e-14);
    for (i, &dx) in dx.iter().enumerate() {
        assert_eq!(dx, if prefix_row(i / width).is_some() { 0.0 } else { before[i] }, "element {i}");
    }

    let mut without = before.clone();
    patch::write_prefix_grad(&mut without, None, &cu_seqlens, prefix, width);
    assert_eq!(without, dx);
}
