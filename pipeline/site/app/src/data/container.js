// One payload: "FFC1", u32 header length, header JSON, columns. Gives { json, columns: { name:
// TypedArray (+ shape) } }.
// The columns are views into the buffer, nothing is copied. A reader takes every dtype from the
// header.

const TYPES = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, i8: Int8Array, i16: Int16Array,
  i32: Int32Array, f32: Float32Array };

export class DamagedShard extends Error {}

export function parseContainer(bytes, key) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || view.getUint32(0, true) !== 0x31434646) throw new DamagedShard(
    `${key}.js does not hold atlas data (no FFC1 mark).`);
  const start = 8 + view.getUint32(4, true);
  if (start > bytes.length) throw new DamagedShard(`${key}.js is cut short inside its header.`);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const columns = Object.create(null);
  for (const column of header.columns) columns[column.name] = readColumn(bytes, start, column, key);
  return { json: header.json ?? {}, columns };
}

function readColumn(bytes, start, { name, dtype, shape, offset }, key) {
  const Type = TYPES[dtype];
  const length = shape.reduce((product, n) => product * n, 1);
  const end = start + offset + length * (Type?.BYTES_PER_ELEMENT ?? 0);
  if (!Type || end > bytes.length) throw new DamagedShard(
    `${key}.js: column ${name} is ${Type ? "cut short" : `of unknown type ${dtype}`}.`);
  const column = new Type(bytes.buffer, bytes.byteOffset + start + offset, length);
  column.shape = shape;
  return column;
}
