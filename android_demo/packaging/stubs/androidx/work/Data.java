package androidx.work;

public final class Data {
    public native String getString(String key);

    public static final class Builder {
        public native Builder putString(String key, String value);

        public native Data build();
    }
}
