package androidx.work;

public final class Constraints {
    private Constraints() {}

    public static final class Builder {
        public native Builder setRequiredNetworkType(NetworkType networkType);

        public native Constraints build();
    }
}
