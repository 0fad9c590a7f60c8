// The words in which two texts differ: those outside their longest common sequence of words.

const WORD = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}'’]+|\S/gu;

/** Ranges of characters that differ in each text, neighbouring words joined, and how many words that is. */
export function differences(left, right) {
  const a = [...left.matchAll(WORD)], b = [...right.matchAll(WORD)];
  const [keptA, keptB] = common(a.map(String), b.map(String));
  return { left: ranges(a, keptA), right: ranges(b, keptB), words: lost(keptA) + lost(keptB) };
}

function common(a, b) {
  const keptA = new Array(a.length).fill(false), keptB = new Array(b.length).fill(false);
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) { keptA[start] = keptB[start] = true; start += 1; }
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) { endA -= 1; endB -= 1; keptA[endA] = keptB[endB] = true; }
  const width = endB - start + 1;
  const longest = new Uint32Array((endA - start + 1) * width);      // longest common sequence of a[i:] and b[j:]
  const at = (i, j) => (i - start) * width + (j - start);
  for (let i = endA - 1; i >= start; i -= 1) {
    for (let j = endB - 1; j >= start; j -= 1) {
      longest[at(i, j)] = a[i] === b[j] ? longest[at(i + 1, j + 1)] + 1 : Math.max(longest[at(i + 1, j)], longest[at(i, j + 1)]);
    }
  }
  for (let i = start, j = start; i < endA && j < endB;) {
    if (a[i] === b[j]) { keptA[i] = keptB[j] = true; i += 1; j += 1; }
    else if (longest[at(i + 1, j)] >= longest[at(i, j + 1)]) { i += 1; }
    else { j += 1; }
  }
  return [keptA, keptB];
}

function ranges(words, kept) {
  const ranges = [];
  words.forEach((match, i) => {
    if (kept[i]) { return; }
    const end = match.index + match[0].length;
    if (i > 0 && !kept[i - 1]) { ranges[ranges.length - 1][1] = end; } else { ranges.push([match.index, end]); }
  });
  return ranges;
}

const lost = (kept) => kept.filter((one) => !one).length;
